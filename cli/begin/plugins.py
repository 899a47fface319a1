"""`expertctl plugins`: what is installed, and what each plugin offers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..context import Session, pass_session
from ..group import cli_command
from ..output import Table

if TYPE_CHECKING:
    from ...core.hooks.manager import PluginManager

WORDS = {
    "merge_methods": "merge method",
    "trainers": "trainer",
    "launchers": "launcher",
    "corpus_formats": "corpus format",
    "domain_discoverers": "domain discoverer",
    "document_orders": "document order",
    "evaluators": "evaluator",
    "routers": "router",
    "architectures": "architecture",
}


@cli_command("plugins", example="expertctl plugins")
@pass_session
def command(session: Session) -> None:
    """List the installed plugins and what they offer."""
    from ...core.hooks.manager import installed_plugins

    plugins = installed_plugins()
    offers = _offers(plugins)
    content = {
        "plugins": [
            {
                "name": one.name,
                "distribution": one.distribution,
                "version": one.version,
                "hooks": list(one.hooks),
                "offers": [offer for offer in offers if offer["plugin"] == one.name],
            }
            for one in plugins.plugins()
        ],
        "problems": [
            {"plugin": problem.plugin, "distribution": problem.distribution, "reason": problem.reason}
            for problem in plugins.problems
        ],
    }
    what = Table(
        ("offers", "name", "what it does", "plugin", "from"),
        [
            (offer["kind"], offer["name"], offer["summary"], offer["plugin"], offer["from"])
            for offer in offers
        ],
    )
    others = [
        f"plugin '{one.name}' ({one.distribution} {one.version}) has {', '.join(one.hooks)}"
        for one in plugins.plugins()
        if not any(offer["plugin"] == one.name for offer in offers)
    ]
    session.finish(content, what, *others)


def _offers(plugins: PluginManager) -> list[dict[str, Any]]:
    """Return everything that plugins offer, by kind and name."""
    found = []
    for hook, word in WORDS.items():
        for name, offer in sorted(getattr(plugins, hook)().items()):
            provider = plugins.provider(hook, name)
            found.append(
                {
                    "kind": word,
                    "name": name,
                    "summary": getattr(offer, "summary", "") or ", ".join(getattr(offer, "model_types", ())),
                    "plugin": provider.name,
                    "from": f"{provider.distribution} {provider.version}",
                }
            )
    return found
