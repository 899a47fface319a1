"""`expertctl plugins`: list the installed plugins and what each of them offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..context import Session, pass_session
from ..group import cli_command
from ..output import Table

if TYPE_CHECKING:
    from ...core.hooks.manager import PluginManager


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
                "name": plugin.name,
                "distribution": plugin.distribution,
                "version": plugin.version,
                "hooks": list(plugin.hooks),
                "offers": [offer for offer in offers if offer["plugin"] == plugin.name],
            }
            for plugin in plugins.plugins()
        ],
        "problems": [asdict(problem) for problem in plugins.problems],
    }
    table = Table(
        ("offers", "name", "description", "plugin", "from"),
        [(offer["kind"], offer["name"], offer["summary"], offer["plugin"], offer["from"]) for offer in offers],
    )
    hook_only = [
        f"plugin '{plugin.name}' ({plugin.distribution} {plugin.version}) implements {', '.join(plugin.hooks)}"
        for plugin in plugins.plugins()
        if plugin.hooks and not any(offer["plugin"] == plugin.name for offer in offers)
    ]
    session.finish(content, table, *hook_only)


def _offers(plugins: PluginManager) -> list[dict[str, Any]]:
    """Return all offers of all plugins, ordered by kind and name."""
    from ...core.hooks.manager import OFFER_KINDS, noun_of

    records = []
    for kind in OFFER_KINDS:
        offers: Mapping[str, Any] = plugins.offers(kind)
        for name, offer in sorted(offers.items()):
            provider = plugins.provider(kind, name)
            records.append(
                {
                    "kind": noun_of(kind),
                    "name": name,
                    "summary": getattr(offer, "summary", "") or ", ".join(getattr(offer, "model_types", ())),
                    "plugin": provider.name,
                    "from": f"{provider.distribution} {provider.version}",
                }
            )
    return records
