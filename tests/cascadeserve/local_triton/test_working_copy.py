from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from cascadeserve.cluster import Cluster, CpuDevice, Endpoint, GpuDevice
from cascadeserve.endpoint_config import endpoint_config_path
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.local_triton.working_copy import model_names, prepare_working_copy
from cascadeserve.triton_config import instance_count, model_digest, model_versions, parse_config, served_versions
from orchestrator.instance_config import InstanceConfig

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = """name: "{name}"
backend: "onnxruntime"
max_batch_size: 64
instance_group [{{ count: 1 kind: KIND_AUTO }}]
"""


def endpoint(name: str, port: int, device: CpuDevice | GpuDevice) -> Endpoint:
    addresses = {kind: f"127.0.0.1:{port + i}" for i, kind in enumerate(("http", "grpc", "metrics"))}
    return Endpoint(name=name, device=device, **addresses)


CPU = endpoint("cpu", 8000, CpuDevice(cores=(0,)))
GPU = endpoint("gpu", 9000, GpuDevice(index=1))
CLUSTER = Cluster(schema_version=1, endpoints=(CPU, GPU))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name in ("small", "large"):
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "1" / "model.onnx").write_bytes(f"weights of {name}".encode())
        (folder / name / "config.pbtxt").write_text(CONFIG.format(name=name))
    (folder / "README.md").write_text("no model")
    return folder


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def count(copy: Path, model: str, endpoint_name: str = "cpu") -> int:
    return instance_count(parse_config(endpoint_config_path(copy, model, endpoint_name).read_text()))


def test_every_model_has_a_config_for_every_endpoint_before_any_server_starts(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert copy == state / "model_repository"
    for model in ("small", "large"):
        for each in CLUSTER.endpoints:
            config = parse_config((copy / model / "configs" / f"{each.name}.pbtxt").read_text())
            assert (config.name, config.backend, config.max_batch_size) == (model, "onnxruntime", 64)
            assert instance_count(config) == 1


def test_configs_name_the_kind_of_their_endpoints_device(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert "kind: KIND_CPU" in endpoint_config_path(copy, "small", "cpu").read_text()
    on_gpu = endpoint_config_path(copy, "small", "gpu").read_text()
    assert "kind: KIND_GPU" in on_gpu
    assert "gpus: 0" in on_gpu, "the server sees one GPU only, whatever its index on the machine"


def test_the_copy_holds_the_models_and_no_more(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert sorted(path.name for path in copy.iterdir()) == ["large", "small"]
    added = {f"{model}/configs/{name}.pbtxt" for model in ("small", "large") for name in ("cpu", "gpu")}
    models = {name: data for name, data in contents(repository).items() if name != "README.md"}
    assert {name: data for name, data in contents(copy).items() if name not in added} == models


def test_the_repository_is_never_touched(repository: Path, state: Path) -> None:
    before = contents(repository), times(repository)
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 3, {1})
    prepare_working_copy(repository, CLUSTER, state)
    assert (contents(repository), times(repository)) == before


def test_a_second_run_touches_no_file_and_no_folder_of_the_copy(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    before = times(copy)
    prepare_working_copy(repository, CLUSTER, state)
    assert times(copy) == before


def test_a_new_endpoint_gets_its_configs_and_the_others_keep_theirs(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, Cluster(schema_version=1, endpoints=(CPU,)), state)
    before = endpoint_config_path(copy, "small", "cpu").stat().st_mtime_ns
    assert not endpoint_config_path(copy, "small", "gpu").exists()
    prepare_working_copy(repository, CLUSTER, state)
    assert endpoint_config_path(copy, "small", "gpu").exists()
    assert endpoint_config_path(copy, "small", "cpu").stat().st_mtime_ns == before


def test_counts_that_the_orchestrator_wrote_survive(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 3, {1})
    prepare_working_copy(repository, CLUSTER, state)
    assert [count(copy, "small", "cpu"), count(copy, "small", "gpu"), count(copy, "large", "cpu")] == [3, 1, 1]


def test_new_weights_are_taken_over_and_counts_survive(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 3, {1})
    untouched = times(copy / "large")
    (repository / "small" / "1" / "model.onnx").write_bytes(b"better weights")
    (repository / "small" / "2").mkdir()
    (repository / "small" / "2" / "model.onnx").write_bytes(b"version 2")
    shutil.rmtree(repository / "small" / "1")
    prepare_working_copy(repository, CLUSTER, state)
    assert [path.name for path in sorted((copy / "small").iterdir())] == ["2", "config.pbtxt", "configs"]
    assert (copy / "small" / "2" / "model.onnx").read_bytes() == b"version 2"
    assert count(copy, "small") == 3
    assert times(copy / "large") == untouched


def test_a_changed_config_is_taken_over_and_starts_at_one_instance(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 3, {1})
    InstanceConfig(copy, CLUSTER).write("cpu", "large", 2, {1})
    config = repository / "small" / "config.pbtxt"
    config.write_text(config.read_text().replace("64", "32"))
    prepare_working_copy(repository, CLUSTER, state)
    changed = parse_config(endpoint_config_path(copy, "small", "cpu").read_text())
    assert (changed.max_batch_size, instance_count(changed)) == (32, 1)
    assert count(copy, "large") == 2


def test_an_endpoint_that_moved_from_cpu_to_gpu_runs_its_models_there(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, Cluster(schema_version=1, endpoints=(CPU,)), state)
    moved = endpoint("cpu", 8000, GpuDevice())
    prepare_working_copy(repository, Cluster(schema_version=1, endpoints=(moved,)), state)
    assert "kind: KIND_GPU" in endpoint_config_path(copy, "small", "cpu").read_text()


def test_a_changed_version_policy_reaches_the_servers(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    config = repository / "small" / "config.pbtxt"
    config.write_text(config.read_text() + "version_policy { specific { versions: 2 } }\n")
    prepare_working_copy(repository, CLUSTER, state)
    served = parse_config(endpoint_config_path(copy, "small", "cpu").read_text())
    assert list(served.version_policy.specific.versions) == [2]


def test_versions_and_warm_up_reach_every_endpoint_and_counts_survive_a_new_version(
    repository: Path, state: Path
) -> None:
    config = repository / "small" / "config.pbtxt"
    config.write_text(config.read_text() + 'model_warmup { name: "batch-1" batch_size: 1 }\n')
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 3, [1])
    (repository / "small" / "2").mkdir()
    (repository / "small" / "2" / "model.onnx").write_bytes(b"version 2")
    config.write_text(config.read_text() + "version_policy { specific { versions: [1, 2] } }\n")
    prepare_working_copy(repository, CLUSTER, state)
    for name in ("cpu", "gpu"):
        served = parse_config(endpoint_config_path(copy, "small", name).read_text())
        assert list(served.version_policy.specific.versions) == [1, 2]
        assert [warmup.batch_size for warmup in served.model_warmup] == [1]
    assert [count(copy, "small", "cpu"), count(copy, "small", "gpu")] == [3, 1]
    assert {path.name for path in (copy / "small").iterdir()} == {"1", "2", "config.pbtxt", "configs"}


def test_a_models_own_folder_named_configs_is_copied(repository: Path, state: Path) -> None:
    inside = repository / "small" / "1" / "configs"
    inside.mkdir()
    (inside / "tokenizer.json").write_text("{}")
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert (copy / "small" / "1" / "configs" / "tokenizer.json").read_text() == "{}"


def test_a_copy_of_a_read_only_repository_can_be_written_by_its_owner(repository: Path, state: Path) -> None:
    for folder in (repository / "small" / "1", repository / "small"):
        folder.chmod(0o555)
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert (copy / "small").stat().st_mode & 0o200


def test_a_failed_copy_leaves_the_old_model_whole(
    repository: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    before = contents(copy)
    (repository / "small" / "1" / "model.onnx").write_bytes(b"better weights")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copytree", fail)
        with pytest.raises(UsageError, match="No space left"):
            prepare_working_copy(repository, CLUSTER, state)
    assert contents(copy) == before
    assert not list(state.glob(".staging-*"))


def test_servers_that_start_at_the_same_time_find_one_whole_copy(repository: Path, state: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        copies = list(pool.map(lambda _: prepare_working_copy(repository, CLUSTER, state), range(4)))
    assert set(copies) == {state / "model_repository"}
    assert not list(state.glob(".staging-*"))
    assert model_names(copies[0]) == ["large", "small"]


def test_git_does_not_see_the_state_directory(repository: Path, tmp_path: Path) -> None:
    work_tree = tmp_path / "checkout"
    state = work_tree / ".state"
    work_tree.mkdir()
    prepare_working_copy(repository, CLUSTER, state)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
    subprocess.run(["git", "init", "--quiet", work_tree], check=True, env=environment)
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"],
        cwd=work_tree, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    assert status.stdout == b""


def test_a_gitignore_of_the_users_own_stays(repository: Path, state: Path) -> None:
    state.mkdir()
    (state / ".gitignore").write_text("mine\n")
    prepare_working_copy(repository, CLUSTER, state)
    assert (state / ".gitignore").read_text() == "mine\n"


@pytest.mark.parametrize(("folder", "words"), [("absent", "is no folder"), ("empty", "holds no model")])
def test_what_is_no_repository_is_refused(folder: str, words: str, tmp_path: Path, state: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArtefact, match=words) as caught:
        prepare_working_copy(tmp_path / folder, CLUSTER, state)
    assert caught.value.path == tmp_path / folder


def test_a_broken_model_config_is_refused_naming_its_file(repository: Path, state: Path) -> None:
    (repository / "small" / "config.pbtxt").write_text("name: small")
    with pytest.raises(InvalidArtefact, match="no Triton model config") as caught:
        prepare_working_copy(repository, CLUSTER, state)
    assert str(caught.value.path).endswith("small/config.pbtxt")


def test_configs_that_the_repository_has_itself_are_brought_along(repository: Path, state: Path) -> None:
    own = repository / "small" / "configs" / "baseline.pbtxt"
    own.parent.mkdir()
    own.write_text(CONFIG.format(name="small") + "dynamic_batching { }\n")
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert endpoint_config_path(copy, "small", "baseline").read_text() == own.read_text()
    assert not endpoint_config_path(copy, "large", "baseline").exists()
    before = times(copy)
    prepare_working_copy(repository, CLUSTER, state)
    assert times(copy) == before
    own.write_text(CONFIG.format(name="small") + "dynamic_batching { max_queue_delay_microseconds: 500 }\n")
    model = (copy / "small" / "1").stat().st_ino
    prepare_working_copy(repository, CLUSTER, state)
    assert endpoint_config_path(copy, "small", "baseline").read_text() == own.read_text()
    assert (copy / "small" / "1").stat().st_ino == model, "the model itself is as it was"


def test_an_endpoints_config_comes_before_one_of_the_same_name(repository: Path, state: Path) -> None:
    own = repository / "small" / "configs" / "cpu.pbtxt"
    own.parent.mkdir()
    own.write_text(CONFIG.format(name="small") + "dynamic_batching { }\n")
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert "dynamic_batching" not in endpoint_config_path(copy, "small", "cpu").read_text()


def test_a_broken_config_of_the_repository_is_named(repository: Path, state: Path) -> None:
    own = repository / "small" / "configs" / "baseline.pbtxt"
    own.parent.mkdir()
    own.write_text("no config")
    with pytest.raises(InvalidArtefact, match=r"small/configs/baseline\.pbtxt"):
        prepare_working_copy(repository, CLUSTER, state)


def test_other_configs_are_no_part_of_what_a_model_is(repository: Path) -> None:
    before = model_digest(repository / "small")
    (repository / "small" / "configs").mkdir()
    (repository / "small" / "configs" / "baseline.pbtxt").write_text(CONFIG.format(name="small"))
    assert model_digest(repository / "small") == before


def add_version(repository: Path, model: str, version: int) -> None:
    (repository / model / str(version)).mkdir()
    (repository / model / str(version) / "model.onnx").write_bytes(f"version {version}".encode())


def served(copy: Path, model: str) -> set[int]:
    return served_versions(
        parse_config(endpoint_config_path(copy, model, "cpu").read_text()), model_versions(copy / model)
    )


def test_a_new_version_comes_beside_the_others_whose_files_are_not_touched(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 3, {1})
    before = times(copy / "small" / "1"), (copy / "small" / "config.pbtxt").stat().st_mtime_ns
    add_version(repository, "small", 2)
    prepare_working_copy(repository, CLUSTER, state)
    assert (copy / "small" / "2" / "model.onnx").read_bytes() == b"version 2"
    assert (times(copy / "small" / "1"), (copy / "small" / "config.pbtxt").stat().st_mtime_ns) == before
    assert served(copy, "small") == {1, 2}, "what serves goes on serving, also after a restart of the server"
    assert count(copy, "small") == 3


def test_versions_that_the_orchestrator_wrote_survive(repository: Path, state: Path) -> None:
    add_version(repository, "small", 2)
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 1, {1})
    before = times(copy)
    prepare_working_copy(repository, CLUSTER, state)
    assert served(copy, "small") == {1}
    assert times(copy) == before


def test_a_version_that_is_gone_is_served_no_more(repository: Path, state: Path) -> None:
    add_version(repository, "small", 2)
    copy = prepare_working_copy(repository, CLUSTER, state)
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 1, {1, 2})
    kept = times(copy / "small" / "2")
    shutil.rmtree(repository / "small" / "1")
    prepare_working_copy(repository, CLUSTER, state)
    assert model_versions(copy / "small") == [2]
    assert served(copy, "small") == {2}
    assert times(copy / "small" / "2") == kept


def test_a_version_policy_of_the_repository_comes_with_its_new_version(repository: Path, state: Path) -> None:
    copy = prepare_working_copy(repository, CLUSTER, state)
    kept = times(copy / "small" / "1")
    add_version(repository, "small", 2)
    config = repository / "small" / "config.pbtxt"
    config.write_text(config.read_text() + "version_policy { specific { versions: [1, 2] } }\n")
    prepare_working_copy(repository, CLUSTER, state)
    assert served(copy, "small") == {1, 2}
    assert times(copy / "small" / "1") == kept
    InstanceConfig(copy, CLUSTER).write("cpu", "small", 1, {2})
    prepare_working_copy(repository, CLUSTER, state)
    assert served(copy, "small") == {2}


def test_the_empty_version_folder_of_an_ensemble_is_copied(repository: Path, state: Path) -> None:
    (repository / "both" / "1").mkdir(parents=True)
    (repository / "both" / "config.pbtxt").write_text(CONFIG.format(name="both"))
    copy = prepare_working_copy(repository, CLUSTER, state)
    assert (copy / "both" / "1").is_dir()
    (repository / "both" / "2").mkdir()
    prepare_working_copy(repository, CLUSTER, state)
    assert model_versions(copy / "both") == [1, 2]


ENSEMBLE = """name: "joined"
platform: "ensemble"
max_batch_size: 64
ensemble_scheduling {
  step { model_name: "tokens" model_version: -1 input_map { key: "a" value: "a" } output_map { key: "b" value: "b" } }
  step { model_name: "small" model_version: -1 input_map { key: "b" value: "b" } output_map { key: "c" value: "c" } }
}
"""
TOKENS = """name: "tokens"
backend: "python"
max_batch_size: 64
instance_group [{ count: 1 kind: KIND_CPU }]
"""


@pytest.fixture
def joined(repository: Path) -> Path:
    (repository / "joined" / "1").mkdir(parents=True)
    (repository / "joined" / "config.pbtxt").write_text(ENSEMBLE)
    (repository / "tokens" / "1").mkdir(parents=True)
    (repository / "tokens" / "1" / "model.py").write_text("TOKENS = 1\n")
    (repository / "tokens" / "config.pbtxt").write_text(TOKENS)
    return repository


def test_an_ensemble_gets_no_instances(joined: Path, state: Path) -> None:
    copy = prepare_working_copy(joined, CLUSTER, state)
    before = times(copy)
    assert prepare_working_copy(joined, CLUSTER, state) == copy
    assert times(copy) == before
    for name in ("cpu", "gpu"):
        config = parse_config(endpoint_config_path(copy, "joined", name).read_text())
        assert not config.instance_group
        assert instance_count(config) == 1
        # what is for the CPU by its config stays there, also beside a GPU
        assert "KIND_CPU" in endpoint_config_path(copy, "tokens", name).read_text()


def test_code_of_a_model_is_compiled_before_a_server_sees_it(joined: Path, state: Path) -> None:
    copy = prepare_working_copy(joined, CLUSTER, state)
    compiled = list((copy / "tokens" / "1" / "__pycache__").iterdir())
    assert [path.name.partition(".")[0] for path in compiled] == ["model"]


def test_the_digest_of_an_ensemble_covers_what_it_is_composed_of(joined: Path) -> None:
    before = model_digest(joined / "joined")
    (joined / "tokens" / "1" / "model.py").write_text("TOKENS = 2\n")
    between = model_digest(joined / "joined")
    (joined / "small" / "1" / "model.onnx").write_bytes(b"other weights")
    assert len({before, between, model_digest(joined / "joined")}) == 3
    (joined / "tokens" / "config.pbtxt").write_text(ENSEMBLE.replace("joined", "tokens"))
    with pytest.raises(InvalidArtefact, match="ensemble within the ensemble 'joined'"):
        model_digest(joined / "joined")
