"""The validation text that a router start may fit the rows of an expert on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....core.errors import UserError
from ....core.hooks.mixtures import RouterInputs

if TYPE_CHECKING:
    from ....core.text.token_store import TokenBlocks


def validation_blocks(inputs: RouterInputs) -> dict[str, TokenBlocks]:
    """Return the validation text by domain."""
    return {text.domain: text.blocks for text in inputs.validation()}


def domains_of_expert(inputs: RouterInputs, texts: Mapping[str, Any], name: str, router: str) -> list[str]:
    """Return the domains of `texts` that an expert was trained on, or the domain of its name.

    Raises `UserError` for an expert without text; `router` is the name of the router start, for the message.
    """
    domains = [domain for domain in inputs.domains.get(name, ()) if domain in texts]
    if not domains and name in texts:
        domains = [name]
    if not domains:
        raise UserError(
            f"router start '{router}' needs validation text of the domain of '{name}'; add the domain to "
            "expertctl.yaml, name domains with --fit-on, or choose another router"
        )
    return domains


def domains_of_seed(inputs: RouterInputs, texts: Mapping[str, Any], name: str) -> list[str]:
    """Return the domains for the seed's own expert: those that the seed was trained on, or else those of no expert."""
    trained = [domain for domain in inputs.domains.get(name, ()) if domain in texts]
    others = [expert for expert in inputs.experts if expert != name]
    taken = {*others, *(domain for expert in others for domain in inputs.domains.get(expert, ()))}
    return trained or [domain for domain in texts if domain not in taken]
