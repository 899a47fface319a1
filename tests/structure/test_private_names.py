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
    (
        "huggingface_hub.utils._http",
        "_GLOBAL_CLIENT_FACTORY",
    ): "core/remote/hub_access.py gives requests to the hub a timeout",
    (
        "torch.distributed.tensor._utils",
        "compute_local_shape_and_global_offset",
    ): "experts/training/distributed/replicas.py finds a process's rows of a tensor",
    **dict.fromkeys(
        (("torch.nn", "Parameter._backward_hooks"), ("torch.nn", "Parameter._post_accumulate_grad_hooks")),
        "experts/training/distributed/replicas.py finds hooks that sharding would lose",
    ),
    ("torch.nn", "Module._apply"): "experts/training/distributed/replicas.py gives a model without weights memory",
    (
        "transformers",
        "PreTrainedConfig._attn_implementation",
    ): "experts/training/steps/attention.py sees which kernel a model uses",
    (
        "asyncio.sslproto",
        "SSLProtocol.max_size",
    ): "plugins/flower/coordinator/reverse_proxy.py bounds the memory of a connection",
    **{
        ("torch._subclasses.fake_tensor", name): "merge/stitched/layer_probe.py runs models without weights"
        for name in ("FakeTensorMode", "DataDependentOutputException", "DynamicOutputShapeException")
    },
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what the libraries import
@pytest.mark.parametrize(("module", "name"), PRIVATE, ids=lambda value: value)
def test_a_private_name_of_another_library_is_there(module: str, name: str) -> None:
    purpose = PRIVATE[module, name]
    holder: object = importlib.import_module(module)
    for part in name.split("."):
        assert hasattr(holder, part), f"{module} dropped {name}, by which {purpose}"
        holder = getattr(holder, part)
