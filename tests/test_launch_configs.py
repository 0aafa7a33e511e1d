"""The launch configurations, key by key, and the commands in their headers are understood by accelerate itself."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.commands.utils import CustomArgumentParser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "recipes" / "configs" / "accelerate").glob("*.yaml"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # or accelerate counts cores and logs before its logger is ready


def launch_parser():
    """The parser of the `accelerate launch` command itself."""
    return launch_command_parser(CustomArgumentParser("accelerate").add_subparsers())


def header_commands(path):
    """The `accelerate launch ...` commands in the comments of a file, without those two words."""
    comments = [line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#")]
    return [
        shlex.split(command)[2:]
        for command in re.findall(r"^accelerate launch .*$", joined(comments), flags=re.MULTILINE)
    ]


def joined(lines):
    return "\n".join(lines).replace("\\\n", " ")


def launched(words):
    args, _, _ = _validate_launch_command(launch_parser().parse_args(words))
    return args


def test_all_four_are_there():
    assert [path.stem for path in FILES] == ["cpu", "ddp", "fsdp2", "multi_node_ddp"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_is_known_to_accelerate(path):
    config = load_config_from_file(str(path))  # raises on unknown keys
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_takes_effect(path):
    """Accelerate silently ignores a key of the file whose command-line option has a default, such as rdzv_backend."""
    keys = yaml.safe_load(path.read_text())
    args = launched(["--config_file", str(path), "recipes/distill.py"])
    for name, value in {**keys, **keys.get("fsdp_config", {})}.items():
        if name == "distributed_type":
            assert (args.multi_gpu, args.use_fsdp) == (value == "MULTI_GPU", value == "FSDP")
        elif name not in ("compute_environment", "fsdp_config"):
            assert getattr(args, name) == value, name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_of_the_header_can_be_launched(path):
    commands = header_commands(path)
    assert commands
    for words in commands:
        args = launched(words)
        assert ROOT / args.config_file == path
        assert (ROOT / args.training_script).is_file()


def test_cpu_starts_one_process_without_a_gpu():
    args = launched(["--config_file", str(ROOT / "recipes/configs/accelerate/cpu.yaml"), "recipes/distill.py"])
    command, environment = prepare_simple_launcher_cmd_env(args)
    assert command[1:] == ["recipes/distill.py"]
    assert environment["ACCELERATE_USE_CPU"] == "True"
    assert "MASTER_PORT" not in environment


def test_ddp_starts_as_many_processes_as_asked():
    args = launched(header_commands(ROOT / "recipes/configs/accelerate/ddp.yaml")[0])
    environment = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "4"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"


@pytest.mark.parametrize("rank", [0, 1])
def test_two_machines_meet_at_machine_0(rank):
    args = launched(header_commands(ROOT / "recipes/configs/accelerate/multi_node_ddp.yaml")[rank])
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.node_rank, args.nproc_per_node) == ("2", rank, "8")
    assert args.rdzv_endpoint == "HOST:29500"


def test_fsdp2_shards_all_and_saves_whole_weights():
    args = launched(header_commands(ROOT / "recipes/configs/accelerate/fsdp2.yaml")[0])
    with patch_environment(**prepare_multi_gpu_env(args)):
        plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.activation_checkpointing is True
    assert plugin.cpu_ram_efficient_loading is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
