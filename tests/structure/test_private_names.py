"""The private names of other libraries that the code uses are still there."""

from __future__ import annotations

import importlib

import pytest

PRIVATE = {
    (
        "transformers.utils.logging",
        "_tqdm_active",
    ): "core/process/environment.py keeps loading bars off the screen",
    (
        "transformers.integrations.moe",
        "_default_apply_gate",
    ): "core/models/kernels/sorted_loop.py recognises plain experts",
    **dict.fromkeys(
        (
            ("flwr.cli.flower_config", "read_superlink_connection"),
            ("flwr.cli.utils", "init_http_client_from_connection"),
            ("flwr.cli.utils", "flwr_cli_exc_handler"),
            ("flwr.proto.control_pb2", "RegisterNodeRequest"),
        ),
        "plugins/flower/coordinator/registering.py registers all members with one connection",
    ),
    **{
        ("torch._subclasses.fake_tensor", name): "merge/stitched/layer_probe.py runs models without weights"
        for name in ("FakeTensorMode", "DataDependentOutputException", "DynamicOutputShapeException")
    },
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the libraries import
@pytest.mark.parametrize(("module", "name"), PRIVATE, ids=lambda value: value)
def test_a_private_name_of_another_library_is_there(module: str, name: str) -> None:
    purpose = PRIVATE[module, name]
    assert hasattr(importlib.import_module(module), name), f"{module} dropped {name}, by which {purpose}"
