"""A server whose models generate with a decoder."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from serving import running_server

from expertctl import UserError
from expertctl.core.models.decoding.opening import DecoderChoice, check_decoder
from expertctl.core.models.generation import Sampling, generate
from expertctl.serving.limits import Limits
from expertctl.serving.models import Loading, ServedModel

PROMPT = "The fox sees"
CONTEXT = DecoderChoice("context_aware", {"context": "A fox lives in the wood. ", "alpha": 1.0})


@pytest.mark.parametrize("name", ["ensemble", "mixture"])
def test_requests_are_answered_with_the_decoder_or_without_it(served_folders: Path, name: str) -> None:
    folder, sampling = served_folders / name, Sampling(8, temperature=0)
    decoded = generate(folder, PROMPT, sampling, decoder=CONTEXT).text
    plain = generate(folder, PROMPT, sampling).text
    assert decoded != plain
    body = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    with running_server([folder], decoder=check_decoder(CONTEXT)) as server:

        def ask(**more: object) -> httpx.Response:
            return httpx.post(f"{server.url}/v1/completions", json=body | more, timeout=60)

        for more, text in (({}, decoded), ({"decoder": "context_aware"}, decoded), ({"decoder": "none"}, plain)):
            assert ask(**more).json()["choices"][0]["text"] == text, more
        refused = ask(decoder="sinks")
        assert refused.status_code == 400
        assert "started with decoder 'context_aware', not with 'sinks'" in refused.text
        shares = ask(shares=True)
        assert shares.status_code == 400
        assert (ask(shares=True, decoder="none").status_code == 200) == (name == "ensemble")


def test_a_decoder_takes_positions_and_one_that_does_not_fit_is_refused(served_folders: Path) -> None:
    plain = ServedModel("mixture", served_folders / "mixture", Limits())
    decoded = ServedModel("mixture", served_folders / "mixture", Limits(), Loading(decoder=check_decoder(CONTEXT)))
    assert decoded.max_length < plain.max_length
    too_long = check_decoder(DecoderChoice("context_aware", {"context": "word " * 10_000}))
    with pytest.raises(UserError, match="shorten the context"):
        ServedModel("mixture", served_folders / "mixture", Limits(), Loading(decoder=too_long))
