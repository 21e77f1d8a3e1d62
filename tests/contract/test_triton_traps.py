"""What Triton does that one would not expect, and what this project does about it: all on one real tritonserver."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from google.protobuf import json_format
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from cascadeserve.triton_config import instance_count, parse_config, with_instance_count
from orchestrator.foreign_load import pending_requests
from orchestrator.instance_config import InstanceConfig
from tests.fakes.servers import Stack, server_pid
from tests.fakes.tiny import write_repository
from tests.orchestrator.conftest import cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]

SLOW = "slow"
_SLEEP_S = 0.1
_SLOW_MODEL = f"""import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep({_SLEEP_S})
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("y", pb_utils.get_input_tensor_by_name(each, "x").as_numpy())])
            for each in requests
        ]
"""
_SLOW_CONFIG = """backend: "python"
max_batch_size: 1
input [{ name: "x" data_type: TYPE_FP32 dims: [3] }]
output [{ name: "y" data_type: TYPE_FP32 dims: [3] }]
instance_group [{ count: 1 kind: KIND_CPU }]
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("traps")
    repository = folder / "repository"
    repository.mkdir()
    write_repository(repository)
    (repository / SLOW / "1").mkdir(parents=True)
    (repository / SLOW / "1" / "model.py").write_text(_SLOW_MODEL)
    (repository / SLOW / "config.pbtxt").write_text(f'name: "{SLOW}"\n{_SLOW_CONFIG}')
    stack = Stack(folder, repository, folder / "no-plan.json", ("a",))
    try:
        stack.start_triton("a")
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def client(stack: Stack) -> Iterator[InferenceServerClient]:
    """Of a server on which every model has one instance, as its file says."""
    with InferenceServerClient(f"127.0.0.1:{stack.ports['a'][1]}") as client:
        yield client
        for name in ("small", SLOW):
            write_count(stack, name, 1)
            client.unload_model(name)
            # which goes on after the call: loaded meanwhile, the old instances would serve on
            wait_until(lambda name=name: not stubs(stack, name))
            client.load_model(name)
            assert counted(client, name) == 1


def wait_until(reached: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + 20.0
    while not reached():
        assert time.monotonic() < give_up_s
        time.sleep(0.02)


def files(stack: Stack) -> InstanceConfig:
    return InstanceConfig(stack.state / "model_repository", cluster(("a",)))


def write_count(stack: Stack, name: str, count: int) -> None:
    files(stack).write("a", name, count, {1})


def counted(client: InferenceServerClient, name: str) -> int:
    return instance_count(client.get_model_config(name).config)


def ask(client: InferenceServerClient, name: str) -> Any:
    tensor = InferInput("x", [1, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3), np.float32))
    return client.infer(name, [tensor])


def override(client: InferenceServerClient, name: str, count: int) -> None:
    config = json_format.MessageToDict(client.get_model_config(name).config, preserving_proto_field_name=True)
    config["instance_group"] = [{"count": count, "kind": "KIND_CPU"}]
    client.load_model(name, config=json.dumps(config))


def stubs(stack: Stack, model: str) -> set[int]:
    """Process ids of a model's Python processes."""
    group = server_pid(stack.tritons["a"])
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
            if (
                b"backend_stub" in command
                and f"\0{model}_".encode() in command
                and os.getpgid(int(entry.name)) == group
            ):
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def test_a_shrink_does_not_end_while_requests_wait_and_ends_at_once_when_none_do(
    stack: Stack, client: InferenceServerClient
) -> None:
    write_count(stack, SLOW, 2)
    client.load_model(SLOW)
    write_count(stack, SLOW, 1)
    over_s = time.monotonic() + 3.0

    def keep_asking() -> None:
        while time.monotonic() < over_s:
            ask(client, SLOW)

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(keep_asking) for _ in range(5)]
        time.sleep(0.5)
        shrinking = pool.submit(client.load_model, SLOW)
        time.sleep(1.5)
        assert not shrinking.done()
        # the config says otherwise already: that the call returns is the only sign
        assert counted(client, SLOW) == 1
        assert len(stubs(stack, SLOW)) == 2
        client.load_model("small")  # other models are not held up
        for each in asking:
            each.result()
        shrinking.result()
    write_count(stack, SLOW, 2)
    client.load_model(SLOW)
    write_count(stack, SLOW, 1)
    with ThreadPoolExecutor(2) as pool:
        # as many as instances remain: Triton's own queue is empty, which is what the orchestrator sees to
        asking = [pool.submit(lambda: [ask(client, SLOW) for _ in range(40)])]
        began_s = time.monotonic()
        client.load_model(SLOW)
        assert not asking[0].done()
        assert time.monotonic() - began_s < 40 * _SLEEP_S
        asking[0].result()


def test_an_override_stays_until_a_file_changes(stack: Stack, client: InferenceServerClient) -> None:
    override(client, "small", 3)
    assert counted(client, "small") == 3
    client.load_model("small")
    assert counted(client, "small") == 3
    write_count(stack, "small", 2)
    client.load_model("small")
    assert counted(client, "small") == 2


def test_a_count_below_one_is_taken_for_another_without_a_word_so_it_is_refused_here(
    stack: Stack, client: InferenceServerClient
) -> None:
    # what is made of it depends on the backend
    for name, instead in ((SLOW, 1), ("small", 2)):
        for count in (0, -1):
            override(client, name, count)
            assert counted(client, name) == instead
    text = (stack.state / "model_repository" / "small" / "configs" / "a.pbtxt").read_text()
    with pytest.raises(ValueError, match="1"):
        with_instance_count(parse_config(text), 0, kind="cpu")


def test_an_empty_override_is_accepted_and_the_model_answers_nothing_any_more(client: InferenceServerClient) -> None:
    client.load_model("small", config="{}")
    assert client.is_model_ready("small")
    with pytest.raises(InferenceServerException):
        ask(client, "small")


def test_a_model_whose_process_died_looks_ready_and_only_loading_it_anew_helps(
    stack: Stack, client: InferenceServerClient
) -> None:
    (stub,) = stubs(stack, SLOW)
    os.kill(stub, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(InferenceServerException, match=f"Stub process '{SLOW}_0_0' is not healthy"):
            ask(client, SLOW)
        assert client.is_model_ready(SLOW)
        assert client.is_server_ready()
        client.load_model(SLOW)
    client.unload_model(SLOW)
    wait_until(lambda: not stubs(stack, SLOW))
    client.load_model(SLOW)
    ask(client, SLOW)


def test_the_first_change_of_a_count_is_in_place_as_the_working_copy_is_compiled(
    stack: Stack, client: InferenceServerClient
) -> None:
    compiled = stack.state / "model_repository" / SLOW / "1" / "__pycache__"
    assert compiled.is_dir()
    before = stubs(stack, SLOW)
    write_count(stack, SLOW, 2)
    client.load_model(SLOW)
    assert before < stubs(stack, SLOW)
    assert len(stubs(stack, SLOW)) == 2
    # without it, the first start of a process writes it, and the next load takes the model for changed
    shutil.rmtree(compiled)
    before = stubs(stack, SLOW)
    client.load_model(SLOW)
    wait_until(lambda: before.isdisjoint(stubs(stack, SLOW)))
    assert len(stubs(stack, SLOW)) == 2


def test_requests_that_wait_are_counted_in_the_metrics(stack: Stack, client: InferenceServerClient) -> None:
    url = f"http://127.0.0.1:{stack.ports['a'][2]}/metrics"
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, client, SLOW) for _ in range(8)]
        time.sleep(1.5 * _SLEEP_S)
        with urllib.request.urlopen(url, timeout=5) as response:
            assert pending_requests(response.read()) >= 3
        for each in asking:
            each.result()


def test_only_the_config_of_its_own_name_counts_for_a_server(stack: Stack, client: InferenceServerClient) -> None:
    folder = stack.state / "model_repository" / "small"
    other = folder / "configs" / "b.pbtxt"
    own = parse_config((folder / "configs" / "a.pbtxt").read_text())
    other.write_text(str(with_instance_count(own, 3, kind="cpu")))
    try:
        before = stubs(stack, "small")
        client.load_model("small")
        assert counted(client, "small") == 1
        assert stubs(stack, "small") == before
    finally:
        other.unlink()
    write_count(stack, "small", 2)
    client.load_model("small")
    assert counted(client, "small") == 2
    assert before < stubs(stack, "small")
