"""Chat templates: well-known ones by their names, and those of model folders.

They are Jinja, rendered by transformers with `trim_blocks` and `lstrip_blocks`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..artefacts.files import read_json
from ..errors import UserError, unknown_name

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
_LLAMA_3 = """\
{%- for message in messages %}
{{- bos_token if loop.first }}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
_EXAONE = """\
{%- if messages[0].role != 'system' %}
{{- '[|system|][|endofturn|]\\n' }}
{%- endif %}
{%- for message in messages %}
{{- '[|' + message.role + '|]' + message.content + ('\\n' if message.role == 'user' else '[|endofturn|]\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '[|assistant|]' }}
{%- endif %}
"""
_MISTRAL = """\
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{{- bos_token }}
{%- for message in (messages[1:] if system else messages) %}
{%- if message.role != ['user', 'assistant'][loop.index0 % 2] %}
{{- raise_exception('after an optional system message, messages must alternate between user and assistant') }}
{%- elif message.role == 'user' %}
{{- ' [INST] ' + (system if loop.first else '') + message.content + ' [/INST]' }}
{%- else %}
{{- ' ' + message.content + eos_token }}
{%- endif %}
{%- endfor %}
"""
_ALPACA = """\
{%- set headings = {'user': '### Instruction:', 'user_context': '### Input:', 'assistant': '### Response:'} %}
{%- for message in messages %}
{%- set heading = headings[message.role] + '\\n' if message.role in headings else '' %}
{{- heading + message.content | trim + ('' if loop.last else '\\n\\n') }}
{%- endfor %}
{%- if add_generation_prompt and messages[-1].role != 'assistant' %}
{{- '\\n\\n### Response:\\n' }}
{%- endif %}
"""
NAMED_TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA_3,
    "mistral": _MISTRAL,
}
AUTO = "auto"
TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE = "tokenizer_config.json"


def require_chat_template(wanted: str) -> None:
    """Raise `UserError` unless a setting is `auto`, the name of a template, or the text of one."""
    if wanted != AUTO and wanted not in NAMED_TEMPLATES and "{" not in wanted:
        choices = unknown_name("chat_template", wanted, [AUTO, *NAMED_TEMPLATES], listed_as="there are")
        raise UserError(f"{choices}, and the text of a template")


def template_of(folder: Path) -> str | None:
    """Return a model's chat template, of several the one named `default`; None if it has none."""
    if (folder / TEMPLATE_FILE).is_file():
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    path = folder / _SETTINGS_FILE
    template = read_json(path).get("chat_template") if path.is_file() else None
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None
