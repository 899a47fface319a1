"""Benchmark of federation transfers: seed down and expert up through the coordinator, against a raw TLS copy with SHA-256.

    python examples/benchmarks/federation_transfer.py --megabytes 2048

The coordinator, the owner and both ends of the raw copy run in processes of their own, each of which reports its peak memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from whole_numbers import at_least

PIECE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=at_least(1), default=2048)
    parser.add_argument("--folder", type=Path, help="Working folder; needs about five times the size. Default: /tmp.")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        print(json.dumps(ROLES[options.role](options.folder)), flush=True)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        measure(Path(scratch), options.megabytes)


def measure(folder: Path, megabytes: int) -> None:
    """Create seed and expert, transfer both, and print the table."""
    (folder / "size").write_text(str(megabytes))
    made = run("make", folder)
    hub = start("hub", folder)
    port = hub.stdout.readline().strip() if hub.stdout else ""
    (folder / "port").write_text(port)
    owner = run("owner", folder)
    hub_said = finish(hub)
    receiver = start("receive", folder)
    (folder / "raw-port").write_text(receiver.stdout.readline().strip() if receiver.stdout else "")
    sender = run("send", folder)
    received = finish(receiver)
    raw = sender["seconds"]
    print(f"seed {made['seed_bytes']:,} bytes, expert {made['expert_bytes']:,} bytes")
    print(f"{'':34}{'seconds':>9}{'MB/s':>8}{'times raw':>11}")
    rows = [
        ("raw copy over TLS, sha256 twice", raw, made["seed_bytes"]),
        ("seed down, checked and kept", owner["down"], made["seed_bytes"]),
        ("expert up, in parts", owner["up"], made["expert_bytes"]),
    ]
    for name, seconds, size in rows:
        print(f"{name:34}{seconds:9.1f}{size / seconds / 1e6:8.0f}{seconds / size * made['seed_bytes'] / raw:11.2f}")
    print(f"{'expert judged tensor by tensor':34}{owner['judged']:9.1f}")
    peaks = {"coordinator": hub_said, "owner": owner, "raw sender": sender, "raw receiver": received}
    print("peak memory, MB: " + ", ".join(f"{name} {said['peak'] / 1e6:.0f}" for name, said in peaks.items()))


def start(role: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--role", role, "--folder", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> dict[str, float]:
    """Close the input of a process, wait for it to end, and return the figures in its last line of output."""
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    figures: dict[str, float] = json.loads(out.splitlines()[-1])
    return figures


def run(role: str, folder: Path) -> dict[str, float]:
    return finish(start(role, folder))


def peak() -> float:
    """Return the peak memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def make(folder: Path) -> dict[str, float]:
    """Create a bfloat16 seed, an invited owner, a request, and an expert that differs from the seed in every tensor."""
    from transformers import AutoConfig

    from expertctl.core.artefacts.digests import digest_of_tensors, digests_of_folder
    from expertctl.core.artefacts.layout import Layout
    from expertctl.core.artefacts.versions import tool_versions
    from expertctl.core.config.settings import TrainingConfig
    from expertctl.core.manifests.manifest import Manifest, Parent, read_manifest
    from expertctl.core.manifests.run import RunSpec
    from expertctl.core.manifests.statements import DataStatement, DomainStatement
    from expertctl.core.testing import tiny_model_folder
    from expertctl.experts.federation.coordinator.coordinator import Coordinator
    from expertctl.experts.federation.owner.owner import Owner, OwnerSettings
    from expertctl.experts.federation.protocol.keys import make_key
    from expertctl.experts.federation.protocol.requests import Recipe
    from expertctl.experts.runs.seed import import_seed
    from expertctl.plugins.flower.protocol.certificates import certificates_for

    hub, origin = folder / "hub", tiny_model_folder(folder / "origin")
    hub.mkdir()
    (hub / "expertctl.yaml").write_text("{}\n")
    layers = max(int((folder / "size").read_text()) // 20, 1)  # of 21 MB each
    config = AutoConfig.from_pretrained(origin)
    config.num_hidden_layers = layers
    config.hidden_size, config.intermediate_size = 1024, 2048
    config.num_attention_heads = config.num_key_value_heads = 8
    config.head_dim = 128
    config.save_pretrained(origin)
    write_random(origin, config, 0)
    import_seed(Layout(hub), origin)
    coordinator = Coordinator(Layout(hub))
    owner = Owner(folder / "owner")
    key = make_key(owner.state)
    coordinator.files.members.add("site-a", key.public)
    (folder / "text.txt").write_text("nothing is trained here\n")
    owner.configure(OwnerSettings(folder / "text.txt"))
    (request,) = coordinator.ask(["site-a"], Recipe("all"), datetime.now(UTC) + timedelta(hours=5))
    owner.take(request)
    expert = owner.expert_folder(request)
    expert.mkdir(parents=True)
    (folder / "expert-origin").mkdir()
    write_random(folder / "expert-origin", config, 0, changed_by=1)
    (folder / "expert-origin" / "model.safetensors").replace(expert / "model.safetensors")
    RunSpec("expert", "site-a", ("site-a",), TrainingConfig(), "all", owner="site-a").write(expert)
    seed = read_manifest(hub / "seed")
    tensors, files = digests_of_folder(expert)
    Manifest(
        kind="expert",
        name="site-a",
        owner="site-a",
        digest=digest_of_tensors(tensors),
        tensors=tensors,
        files=files,
        tokenizer=seed.tokenizer,
        parents=(Parent("seed", "seed", seed.digest, 1.0),),
        config=RunSpec("expert", "site-a", ("site-a",), TrainingConfig(), "all", owner="site-a"),
        data=DataStatement({"site-a": DomainStatement(1, 10, 30)}),
        trainable="all",
        versions=tool_versions(),
    ).write(expert)
    certificates_for(folder / "tls", [])
    sizes = [sum(path.stat().st_size for path in where.iterdir()) for where in (hub / "seed", expert)]
    return {"seed_bytes": sizes[0], "expert_bytes": sizes[1], "peak": peak()}


def write_random(folder: Path, config: object, seed: int, changed_by: int | None = None) -> None:
    """Write random bfloat16 tensors of a model, changed a little by another random seed."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        shapes = {name: tensor.shape for name, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    noise = torch.Generator().manual_seed(seed)
    change = torch.Generator().manual_seed(changed_by if changed_by is not None else seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=noise).mul_(0.02)
        if changed_by is not None:
            values += torch.randn(shape, generator=change).mul_(0.004)
        tensors[name] = values.to(torch.bfloat16)
    (folder / "model.safetensors").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def hub(folder: Path) -> dict[str, float]:
    """Serve as coordinator until standard input closes."""
    from expertctl import Reporter
    from expertctl.core.artefacts.layout import Layout
    from expertctl.experts.federation.coordinator.coordinator import Coordinator
    from expertctl.plugins.flower.coordinator.reverse_proxy import Gateway, TlsServer
    from expertctl.plugins.flower.protocol.certificates import certificates_for
    from expertctl.plugins.flower.protocol.endpoints import Endpoints

    certificates = certificates_for(folder / "tls", [])
    coordinator = Coordinator(Layout(folder / "hub"))
    endpoints = Endpoints(coordinator, certificates.fingerprint, Reporter())
    door = TlsServer(Gateway(lambda: "127.0.0.1:9", certificates, endpoints), "127.0.0.1", 0, certificates)
    print(door.open(), flush=True)
    sys.stdin.read()
    door.close()
    return {"peak": peak()}


def owner(folder: Path) -> dict[str, float]:
    """Act as owner: download the seed, deliver the expert."""
    from expertctl.experts.federation.owner.owner import Owner
    from expertctl.experts.federation.protocol.delivery import make_delivery
    from expertctl.experts.federation.protocol.parts import read_part
    from expertctl.plugins.flower.owner.coordinator_client import CoordinatorClient
    from expertctl.plugins.flower.owner.owner_work import part_size

    owner = Owner(folder / "owner")
    client = CoordinatorClient(f"127.0.0.1:{(folder / 'port').read_text()}", folder / "tls" / "ca.crt", owner.key())
    (request,) = owner.requests()
    client.hello()  # connected, as a joined owner is
    begun = time.monotonic()
    for writer in owner.seeds.writers(request):
        for index in writer.missing():
            writer.put(index, client.seed_part(request.id, writer.file, index))
    for writer in owner.seeds.writers(request):
        writer.finish()
    down = time.monotonic() - begun
    target, expert = owner.delivery_folder(request), owner.expert_folder(request)
    size = part_size((expert / "model.safetensors").stat().st_size)
    signed = make_delivery(expert, request, owner.key(), target, part_size=size)
    begun = time.monotonic()
    missing = client.begin(request.id, signed).missing
    for file in signed.statement.files:
        for index in missing[file.name]:
            client.put(request.id, file, index, read_part(target / file.name, file, index))
    up = time.monotonic() - begun
    begun = time.monotonic()
    while (verdict := client.finish(request.id)).state == "judging":
        time.sleep(0.2)
    if verdict.state != "accepted":
        sys.exit(f"not accepted: {verdict}")
    judged = time.monotonic() - begun
    client.close()
    return {"down": down, "up": up, "judged": judged, "peak": peak()}


def receive(folder: Path) -> dict[str, float]:
    """Receive one file over TLS, write it to disk and compute its digest."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "tls" / "server.crt", folder / "tls" / "server.key")
    digest, buffer = hashlib.sha256(), bytearray(PIECE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        plain, _ = listener.accept()
        with context.wrap_socket(plain, server_side=True) as connection, (folder / "copy").open("wb") as file:
            while count := connection.recv_into(buffer):
                digest.update(memoryview(buffer)[:count])
                file.write(memoryview(buffer)[:count])
                if file.tell() == (folder / "hub" / "seed" / "model.safetensors").stat().st_size:
                    break
            file.flush()
            os.fsync(file.fileno())
            connection.sendall(digest.digest())
    return {"peak": peak()}


def send(folder: Path) -> dict[str, float]:
    """Send the weights of the seed over TLS and wait for the digest."""
    context = ssl.create_default_context(cafile=str(folder / "tls" / "ca.crt"))
    begun, digest = time.monotonic(), hashlib.sha256()
    with (
        socket.create_connection(("127.0.0.1", int((folder / "raw-port").read_text()))) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        (folder / "hub" / "seed" / "model.safetensors").open("rb") as file,
    ):
        while piece := file.read(PIECE):
            digest.update(piece)
            connection.sendall(piece)
        if connection.recv(32) != digest.digest():
            sys.exit("the copy is not the file")
    return {"seconds": time.monotonic() - begun, "peak": peak()}


ROLES = {"make": make, "hub": hub, "owner": owner, "receive": receive, "send": send}

if __name__ == "__main__":
    main()
