"""Options: where they come from, what is refused, and that all faults are told at once."""

import dataclasses
import json
import sys
from typing import Literal

import pytest
import torch
from recipe_runs import option_classes
from transformers import TrainingArguments

from nlpxfer.config import NEEDED_SWITCHES, REFUSED_OPTIONS, DataOptions, RunOptions, option, parse, resolved
from nlpxfer.errors import ConfigError, NlpxferError, nearest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Every kind of field."""

    seed: int = option(42, "A whole number.")
    learning_rate: float = option(1e-4, "A number.")
    text_column: str = option("text", "A text with 100 % sign.")
    overwrite: bool = option(False, "Off.")
    control_arm: bool = option(True, "On.")
    compile: bool | None = option(None, "Undecided.")
    limit: int | None = option(2, "A number or nothing.")
    layers: list[str] = dataclasses.field(default_factory=list)
    trackers: None | str | list[str] = option("none", "One or several.")
    pooling: Literal["own", "mean"] = option("own", "A choice.")
    extras: dict | str | None = option(None, "Nested.")


def read(*words):
    (options,) = parse([Options], list(words))
    return options


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and gives its path."""

    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def faults_of(*words, types=(Options,)):
    with pytest.raises(ConfigError) as caught:
        parse(types, list(words))
    assert str(caught.value).endswith("Try: --help lists all options")
    for fault in caught.value.faults:
        assert fault in str(caught.value)
    return list(caught.value.faults)


# -- where values come from


def test_default_yaml_command_line(config):
    path = config("seed: 7\nlearning_rate: 0.5\n")
    assert (read().seed, read().learning_rate) == (42, 1e-4)
    assert (read(path).seed, read(path).learning_rate) == (7, 0.5)
    both = read(path, "--seed", "9")
    assert (both.seed, both.learning_rate, both.text_column) == (9, 0.5, "text")


def test_words_come_from_the_program_by_default(monkeypatch, config):
    monkeypatch.setattr(sys, "argv", ["finetune.py", config("seed: 7"), "--overwrite"])
    (options,) = parse([Options])
    assert (options.seed, options.overwrite) == (7, True)


@pytest.mark.parametrize(
    "words",
    [["--learning_rate", "2e-5"], ["--learning_rate=2e-5"], ["--learning-rate", "2e-5"], ["--learning-rate=2e-5"]],
)
def test_forms_of_the_command_line(words):
    assert read(*words).learning_rate == 2e-5


def test_values_are_typed_alike_from_both_sides(config):
    values = {"seed": "3", "learning_rate": "2e-5", "text_column": "7", "compile": "true", "limit": "5"}
    from_words = read(*(f"--{key}={value}" for key, value in values.items()))
    from_yaml = read(config("\n".join(f"{key}: {value}" for key, value in values.items())))
    assert from_words == from_yaml == Options(seed=3, learning_rate=2e-5, text_column="7", compile=True, limit=5)
    assert isinstance(from_yaml.learning_rate, float)


@pytest.mark.parametrize(
    "value", ["1.10", "no", "on", "007", "2024-01-01", "1_000", "0x1f", "yes: maybe", "-3", "--seed", "a b"]
)
def test_texts_are_not_reinterpreted(config, value):
    assert read(config(f"text_column: {value!r}")).text_column == value
    if ":" not in value:
        assert read(config(f"text_column: {value}")).text_column == value
    assert read(f"--text_column={value}").text_column == value


@pytest.mark.parametrize(
    ("word", "value"), [("true", True), ("yes", True), ("1", True), ("false", False), ("no", False)]
)
def test_booleans(config, word, value):
    for name in ("overwrite", "control_arm", "compile"):
        assert getattr(read(f"--{name}", word), name) is value
        assert getattr(read(config(f"{name}: {word}")), name) is value


def test_flags_alone():
    options = read("--overwrite", "--compile", "--seed", "1")
    assert (options.overwrite, options.compile, options.seed) == (True, True, 1)


def test_null_is_no_value(config):
    assert read(config("limit: null\ncompile:\ntrackers: ~")) == Options(limit=None, compile=None, trackers=None)
    assert read(config("text_column: 'null'")).text_column == "null"
    assert faults_of(config("seed: null")) == [
        "seed: it has no value; write one, or leave the key out (in config.yaml)"
    ]
    assert "unknown option" in faults_of(config("sede: null"))[0]


def test_lists(config):
    for options in (read("--layers", "0", "2", "-5"), read(config("layers: [0, 2, -5]"))):
        assert options.layers == ["0", "2", "-5"]
    assert read("--layers", "bottom").layers == ["bottom"]
    for options in (read("--trackers", "wandb", "mlflow"), read(config("trackers:\n- wandb\n- mlflow"))):
        assert options.trackers == ["wandb", "mlflow"]
    assert read("--trackers", "wandb").trackers == "wandb"
    assert "empty list" in faults_of(config("overwrite: []"))[0]


def test_nested_values_keep_their_types(config):
    path = config("extras: {cycles: 3, floor: 1e-5, on: true, name: '1e-5', none: null, many: [1, 2.5]}")
    expected = {"cycles": 3, "floor": 1e-5, "on": True, "name": "1e-5", "none": None, "many": [1, 2.5]}
    assert json.loads(read(path).extras) == expected
    (options,) = parse([RunOptions], [config("lr_scheduler_kwargs: {min_lr: 1e-5, num_cycles: 2}")])
    assert options.lr_scheduler_kwargs == {"min_lr": 1e-5, "num_cycles": 2}


def test_empty_file(config):
    assert read(config("# nothing\n")) == Options()


# -- what is refused


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--sede", "1"], "sede: unknown option; did you mean seed?"),
        (["--learning-rat=1"], "learning_rat: unknown option; did you mean learning_rate?"),
        (["--xyzzy", "1"], "xyzzy: unknown option"),
        (["--no_control_arm"], "no_control_arm: unknown option; did you mean control_arm?"),
        (["--see", "1"], "see: unknown option; did you mean seed?"),  # no abbreviations
        (["--seed", "1.5"], "seed: invalid int value: '1.5'"),
        (["--seed", "many"], "seed: invalid int value: 'many'"),
        (["--learning_rate", "fast"], "learning_rate: invalid float value: 'fast'"),
        (["--learning_rate", "nan"], "learning_rate: nan is not a finite number"),
        (["--learning_rate", "inf"], "learning_rate: inf is not a finite number"),
        (["--seed", "1", "2"], "seed: takes one value, but got 1 2"),
        (["--overwrite", "true", "config.yaml"], "overwrite: takes one value, but got true config.yaml"),
        (["--seed"], "seed: expected one argument"),
        (["--seed", "1", "--seed", "2"], "seed: given twice on the command line"),
        (["--learning_rate", "1", "--learning-rate=2"], "learning_rate: given twice on the command line"),
    ],
)
def test_faults_of_the_command_line(words, fault):
    assert faults_of(*words) == [fault]


def test_the_home_folder_is_written_out(monkeypatch, config):
    monkeypatch.setenv("HOME", "/home/alice")
    both = [DataOptions, RunOptions]
    data, run = parse(both, ["--train_file=~/a.csv", "--output_dir", "~/out", "--text_column", "~"])
    assert (data.train_file, run.chosen_output_dir, data.text_column) == ("/home/alice/a.csv", "/home/alice/out", "~")
    assert parse(both, [config('dataset_name: "~/set"\n')])[0].dataset_name == "/home/alice/set"


@pytest.mark.parametrize("name", ["dataset_name", "train_file", "text_column", "output_dir", "hub_model_id"])
def test_the_name_of_nothing_is_no_name(name, config):
    told = f"{name}: it is empty; leave it out"
    assert faults_of(f"--{name}", "", types=(DataOptions, RunOptions)) == [told]
    assert faults_of(config(f'{name}: ""\n'), types=(DataOptions, RunOptions))[0].startswith(told)


def test_other_faults_of_the_command_line():
    assert "Truthy value expected: got perhaps" in faults_of("--overwrite", "perhaps")[0]
    (fault,) = faults_of("--pooling", "maen")
    assert fault.startswith("pooling: ")
    assert "own" in fault
    assert "mean" in fault
    with pytest.raises(ConfigError, match=r"There is no configuration file seed"):
        read("seed", "1")
    assert faults_of("--seed=1", "-x")[0] == "seed: takes one value, but got 1 -x"
    assert faults_of("-x") == ["'-x': expected --key before it"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("seed: 1.5", "seed: invalid int value: '1.5' (in config.yaml)"),
        ("seed: [1, 2]", "seed: takes one value, but got 1 2 (in config.yaml)"),
        ("temprature: 2", "temprature: unknown option (in config.yaml)"),
        ("learning_rates: 2", "learning_rates: unknown option; did you mean learning_rate? (in config.yaml)"),
        ("seed: 1\nlimit: 2\nseed: 3", "seed: given twice (in config.yaml)"),
        ("learning_rate: 1\nlearning-rate: 3", "learning_rate: given twice (in config.yaml)"),
        ("train:\n  seed: 1", "train: unknown option (in config.yaml)"),
    ],
)
def test_faults_of_the_file(config, text, fault):
    assert faults_of(config(text)) == [fault]


def test_files_that_are_no_flat_yaml(config, tmp_path):
    for text, message in [
        ("seed: [1", "is not valid YAML"),
        ("- 1\n- 2", "holds a list"),
        ("seed 1", "holds a text"),
        ("seed: 1\n---\nseed: 2", "is not valid YAML"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read(config(text))
    assert (
        "no value can be read from tag:yaml.org,2002:python" in faults_of(config("seed: !!python/name:os.system x"))[0]
    )
    (tmp_path / "bytes.yaml").write_bytes(b"seed: \xff\xfe")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        read(str(tmp_path / "bytes.yaml"))
    with pytest.raises(ConfigError) as caught:
        read(str(tmp_path / "cnofig.yaml"))
    assert "There is no configuration file" in str(caught.value)
    assert str(tmp_path / "config.yaml") in str(caught.value)
    with pytest.raises(ConfigError, match="There is no configuration file"):
        read(str(tmp_path / "no" / "such.yaml"))


def test_all_faults_are_told_at_once(config):
    path = config("sede: 1\nmax_length: 2\ntest_share: 0.9")
    words = [path, "--num_seeds", "0", "--learning_rate", "-1", "--deepspeed", "x.json", "--max_steps", "7", "stray"]
    faults = faults_of(*words, types=(DataOptions, RunOptions))
    assert faults == [
        "sede: unknown option; did you mean seed? (in config.yaml)",
        f"deepspeed: not supported: {REFUSED_OPTIONS['deepspeed']}",
        "max_steps: takes one value, but got 7 stray",
        "max_length: 2 is too small; want at least 4",
        "test_share: 0.9 is not between 0 and 0.5",
        "num_seeds: 0 is below 1",
        "learning_rate: -1.0 is not positive",
    ]
    with pytest.raises(ConfigError, match="7 options cannot be used"):
        parse((DataOptions, RunOptions), words)


def test_command_line_mends_the_file(config):
    assert read(config("seed: many"), "--seed", "1").seed == 1


# -- data options


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"max_length": 3}, "max_length: 3 is too small; want at least 4"),
        ({"validation_share": 0.0}, "validation_share: 0.0 is not between 0 and 0.5"),
        ({"test_share": 0.5}, "test_share: 0.5 is not between 0 and 0.5"),
        ({"max_train_samples": 0}, "max_train_samples: 0 is not positive"),
        ({"data_split_seed": -1}, "data_split_seed: -1 is negative"),
        (
            {"dataset_name": "a", "train_file": "b.csv"},
            "dataset_name and train_file: give one of the two, not both",
        ),
    ],
)
def test_data_options_out_of_range(values, fault):
    with pytest.raises(ConfigError) as caught:
        DataOptions(**values)
    assert caught.value.faults == (fault,)


# -- run options


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"num_seeds": 0}, "num_seeds: 0 is below 1"),
        ({"seed": -1}, "seed: -1 is not between 0 and 2^32"),
        ({"seed": 2**32 - 1}, "seed: 4294967295 is not between 0 and 2^32"),
        ({"data_seed": -3}, "data_seed: -3 is not between 0 and 2^32"),
        ({"num_train_epochs": 0.0}, "num_train_epochs: 0.0 is not positive"),
        ({"max_steps": 0}, "max_steps: 0 is not positive"),
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not positive"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 is negative"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: -1.0 is negative"),
        ({"adam_beta1": 1.0}, "adam_beta1: 1.0 is not in [0, 1)"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor: 1.0 is not in [0, 1)"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0 is below 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: 0 is below 1"),
        ({"save_total_limit": 0}, "save_total_limit: 0 is below 1"),
        ({"num_threads": 0}, "num_threads: 0 is below 1"),
        ({"num_folds": 1}, "num_folds: 1 is not 0 or above 1"),
        ({"num_folds": -2}, "num_folds: -2 is not 0 or above 1"),
        ({"abstain_precision": 1.0}, "abstain_precision: 1.0 is not between 0 and 1"),
        ({"abstain_precision": 0.0}, "abstain_precision: 0.0 is not between 0 and 1"),
        ({"early_stopping_patience": -1}, "early_stopping_patience: it cannot be negative"),
        ({"pooling": "maen"}, "pooling: 'maen' is not one of auto, own, mean"),
        (
            {"train_sampling_strategy": "sequential"},
            "train_sampling_strategy: 'sequential' is not one of group_by_length, random",
        ),
        (
            {"metric_for_best_model": "f1"},
            "metric_for_best_model: 'f1' is not one of accuracy, macro_f1, loss, micro_f1, sample_f1, "
            "mean_absolute_error, mean_squared_error, pearson, spearman",
        ),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "accelerator_config: dispatch_batches is not supported: each process reads its own rows",
        ),
        (
            {"accelerator_config": '{"split_batches": true}'},
            "accelerator_config: split_batches is not supported: per_device_train_batch_size counts the rows of one "
            "process",
        ),
        ({"push_to_hub": True}, "push_to_hub: needs hub_model_id, such as --hub_model_id team/name"),
        (
            {"neftune_noise_alpha": 5.0},
            f"neftune_noise_alpha: not supported: {REFUSED_OPTIONS['neftune_noise_alpha']}",
        ),
        (
            {"remove_unused_columns": True},
            f"remove_unused_columns: not supported: {REFUSED_OPTIONS['remove_unused_columns']}",
        ),
        (
            {"resume_from_checkpoint": "runs/checkpoint-3"},
            "resume_from_checkpoint: 'runs/checkpoint-3' is not true or false; nlpxfer resumes the run in output_dir",
        ),
    ],
)
def test_run_options_out_of_range(values, fault):
    with pytest.raises(ConfigError) as caught:
        RunOptions(**values)
    assert caught.value.faults == (fault,)


def test_batches_of_an_accelerator_config_in_a_file_are_refused_too(tmp_path):
    path = tmp_path / "accelerator.json"
    path.write_text('{"split_batches": true, "even_batches": true}')
    (fault,) = faults_of("--accelerator_config", str(path), types=(RunOptions,))
    assert fault.startswith("accelerator_config: split_batches is not supported")
    path.write_text('{"split_batches": false}')
    (options,) = parse([RunOptions], ["--accelerator_config", str(path)])
    assert options.accelerator_config.split_batches is False


def test_early_stopping_needs_evaluations():
    with pytest.raises(
        ConfigError, match="eval_strategy: no keeps no best weights; also give --load_best_model_at_end"
    ):
        RunOptions(eval_strategy="no")
    with pytest.raises(ConfigError, match="early_stopping_patience: needs eval_strategy"):
        RunOptions(early_stopping_patience=2, eval_strategy="no", save_strategy="no", load_best_model_at_end=False)


def test_faults_that_transformers_finds_are_told_too():
    (fault,) = faults_of("--save_strategy", "no", types=(RunOptions,))
    assert "load_best_model_at_end" in fault


def test_faults_are_told_before_the_processes_meet(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: pytest.fail("they met"))
    types = option_classes("adapters")
    of_adapter, of_run = ["--adapter_rank", "0"], ["--seed", "-1", "--num_trials", "2"]
    searched = ["--learning_rate", "{low: 0, high: 1e-3}"]
    assert len(faults_of(*of_adapter, types=types)) == 1
    assert len(faults_of(*of_run, *searched, types=types)) == 2
    assert len(faults_of("--eval_steps", "5", types=types)) == 1
    assert len(faults_of(*of_adapter, *of_run, *searched, "--max_length", "2", types=types)) == 4


def test_defaults_of_a_run():
    (options,) = parse([RunOptions], [])
    assert (options.learning_rate, options.num_train_epochs, options.warmup_steps) == (2e-5, 2.0, 0.1)
    assert (options.eval_strategy, options.save_strategy, options.report_to) == ("epoch", "epoch", [])
    assert (options.wanted_bf16, options.bf16, options.resume) == (None, False, False)


@pytest.mark.parametrize(
    ("words", "resume"),
    [(["--resume_from_checkpoint"], True), (["--resume_from_checkpoint", "True"], True), ([], False)],
)
def test_resume(words, resume):
    assert parse([RunOptions], words)[0].resume is resume


@pytest.mark.parametrize(("words", "wanted"), [([], None), (["--bf16"], True), (["--bf16", "false"], False)])
def test_bf16_remembers_what_was_asked_for(words, wanted):
    (options,) = parse([RunOptions], words)
    assert options.wanted_bf16 is wanted
    assert options.bf16 is bool(wanted)


def test_strategies_may_be_bare_words(config):
    path = config("eval_strategy: no\nsave_strategy: no\nload_best_model_at_end: no\nreport_to: none")
    (options,) = parse([RunOptions], [path])
    assert (options.eval_strategy, options.save_strategy, options.load_best_model_at_end) == ("no", "no", False)


# -- every field of TrainingArguments

# Words that are valid for a field, where no simple rule gives one.
EXAMPLES = {
    "lr_scheduler_kwargs": ["{}"],
    "optim_args": ["a=1"],
    "activation_checkpointing_kwargs": ["{}", "--activation_checkpointing"],
    "gradient_checkpointing_kwargs": ["{}", "--gradient_checkpointing"],
    "liger_kernel_config": ['{"rope": true}', "--use_liger_kernel"],
    "accelerator_config": ['{"split_batches": false}'],
    "fsdp_config": ['{"min_num_params": 7}', "--fsdp=true"],
    "fsdp": [""],
    "debug": ["underflow_overflow"],
    "resume_from_checkpoint": ["true"],
    "dataloader_prefetch_factor": ["2", "--dataloader_num_workers=2"],
    "dataloader_persistent_workers": ["true", "--dataloader_num_workers=2"],
    "eval_steps": ["5", "--eval_strategy=steps", "--save_strategy=steps"],
    "save_steps": ["5", "--save_strategy=steps", "--eval_strategy=steps", "--eval_steps=5"],
    "eval_strategy": ["steps", "--save_strategy=steps"],
    "save_strategy": ["best"],
    "load_best_model_at_end": ["false"],
    "push_to_hub": ["true", "--hub_model_id=team/name"],
    "metric_for_best_model": ["loss"],
    "train_sampling_strategy": ["random"],
    "tf32": ["false"],
    "torch_compile_backend": ["eager"],
    "log_level": ["info"],
    "log_level_replica": ["info"],
    "report_to": ["none"],
    "ddp_backend": ["gloo"],
    "logging_strategy": ["epoch"],
    "dataloader_multiprocessing_context": ["spawn", "--dataloader_num_workers=2"],
    "dataloader_pin_memory": ["false"],
    "lr_scheduler_type": ["cosine"],
    "optim": ["sgd"],
    "fp16": ["false"],
}


def words_for(field):
    """A valid value of a field, and what it needs beside it."""
    if field.name in EXAMPLES:
        return EXAMPLES[field.name]
    switch, wanted = NEEDED_SWITCHES.get(field.name, (None, None))
    needed = [f"--{switch}={wanted or 'tensorboard'}"] if switch else []
    if switch == "push_to_hub":
        needed.append("--hub_model_id=team/name")
    numbers = {"num_train_epochs": "1", "max_steps": "5", "warmup_steps": "3", "weight_decay": "0.5"}
    if isinstance(field.default, bool) or "bool" in str(field.type):
        return ["true", *needed]
    if isinstance(field.default, float) or field.type is float:
        return [numbers.get(field.name, "0.5"), *needed]
    if isinstance(field.default, int) or "int" in str(field.type):
        return ["3", *needed]
    return ["x", *needed]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("field", dataclasses.fields(TrainingArguments), ids=lambda field: field.name)
def test_every_option_of_transformers_is_accepted_or_refused_with_a_reason(field, monkeypatch):
    value, *others = words_for(field)
    words = [f"--{field.name}={value}", *others]
    if field.name in REFUSED_OPTIONS:
        assert f"{field.name}: not supported: {REFUSED_OPTIONS[field.name]}" in faults_of(*words, types=(RunOptions,))
        return
    if field.name == "ddp_backend":
        assert faults_of(*words, types=(RunOptions,)) == [
            "ddp_backend: needs several processes, but this is the only one"
        ]
        return
    (options,) = parse([RunOptions], words)
    found = getattr(options, field.name)
    accepted = {"true": [True, "true"], "false": [False], "none": [[]], "": ["", []], "{}": [{}]}.get(value)
    accepted = {"debug": [["underflow_overflow"]], "liger_kernel_config": [{"rope": True}]}.get(field.name, accepted)
    if field.name == "accelerator_config":
        assert found.split_batches is False
    elif field.name == "fsdp_config":
        assert (options.fsdp, found["min_num_params"]) == (True, 7)
    else:
        assert found in accepted if accepted else str(getattr(found, "value", found)) in (value, f"{value}.0")


def test_refused_options_are_fields_and_have_reasons():
    names = {field.name for field in dataclasses.fields(RunOptions)}
    assert set(REFUSED_OPTIONS) <= names
    for name, reason in REFUSED_OPTIONS.items():
        assert len(reason) > 15, name
    names |= {field.name for field in dataclasses.fields(DataOptions)}
    assert set(NEEDED_SWITCHES) <= names
    assert {switch for switch, _ in NEEDED_SWITCHES.values()} <= names


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--eval_steps", "10"], "eval_steps: has no effect without --eval_strategy steps"),
        (["--save_steps", "10"], "save_steps: has no effect without --save_strategy steps"),
        (["--run_name", "x"], "run_name: has no effect without --report_to a tracker"),
        (["--hub_private_repo"], "hub_private_repo: has no effect without --push_to_hub true"),
        (
            ["--activation_checkpointing_kwargs", "{}"],
            "activation_checkpointing_kwargs: has no effect without --activation_checkpointing true",
        ),
    ],
)
def test_options_that_wait_for_a_switch_are_refused(words, fault):
    assert faults_of(*words, types=(RunOptions,)) == [fault]


def test_a_switch_of_the_file_does_not_hide_an_option_without_effect(config):
    path = config("eval_strategy: epoch\nrun_name: null")
    assert faults_of(path, "--eval_steps=5", types=(RunOptions,)) == [
        "eval_steps: has no effect without --eval_strategy steps"
    ]
    path = config("eval_strategy: epoch\neval_steps: 5")
    assert faults_of(path, types=(RunOptions,)) == [
        "eval_steps: has no effect without --eval_strategy steps (in config.yaml)"
    ]


def test_a_switch_that_is_off_on_purpose_is_no_fault(config):
    path = config("eval_strategy: steps\neval_steps: 10\nsave_strategy: steps\nsave_steps: 10")
    words = ["--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
    (options,) = parse([RunOptions], [path, *words])
    assert options.eval_strategy == "no"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overruled:
    """Passes that a number of steps makes meaningless."""

    overruled_by = {"passes": "max_steps"}  # noqa: RUF012

    passes: float = option(5.0, "Passes.")


def test_an_option_that_another_overrules_is_refused(config):
    types = (Overruled, RunOptions)
    assert faults_of("--passes", "3", "--max_steps", "7", types=types) == ["passes: does nothing beside max_steps"]
    path = config("passes: 3\nmax_steps: 7")
    assert faults_of(path, types=types) == ["passes: does nothing beside max_steps (in config.yaml)"]
    for words in (["--passes", "3"], [path, "--max_steps", "-1"], [path, "--passes", "5"], ["--max_steps", "7"]):
        parse(types, words)


def test_epochs_beside_steps_are_refused(config):
    fault = "num_train_epochs: does nothing beside max_steps"
    assert faults_of("--num_train_epochs", "3", "--max_steps", "7", types=(RunOptions,)) == [fault]
    path = config("num_train_epochs: 3")
    assert faults_of(path, "--max_steps", "7", types=(RunOptions,)) == [f"{fault} (in config.yaml)"]
    (options,) = parse((RunOptions,), [config("num_train_epochs: 2.0"), "--max_steps", "7"])
    assert (options.num_train_epochs, options.max_steps) == (2.0, 7)
    (options,) = parse((RunOptions,), ["--num_train_epochs", "3"])
    assert (options.num_train_epochs, options.max_steps) == (3.0, -1)


def test_copies_of_options_are_accepted():
    (options,) = parse([RunOptions], ["--bf16", "false"])
    assert dataclasses.replace(options, learning_rate=0.5).learning_rate == 0.5


# -- help, record, errors


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        parse((DataOptions, RunOptions), ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "[config.yaml]" in text
    for name in ("train_file", "learning_rate", "num_seeds", "adam_beta1"):
        assert f"--{name}" in text
    for name in ("hub_token", "deepspeed", "no_control_arm"):
        assert f"--{name}" not in text
    with pytest.raises(SystemExit):
        read("config.yaml", "-h")
    assert "100 % sign" in capsys.readouterr().out


def test_resolved_is_strict_json_without_tokens(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    options = RunOptions(
        hub_model_id="team/name", lr_scheduler_type="cosine", lr_scheduler_kwargs={"floor": float("inf"), "of": (1, 2)}
    )
    record = resolved(DataOptions(train_file="a.csv"), options)
    text = json.dumps(record, allow_nan=False)
    assert json.loads(text) == record
    assert "token" not in record
    assert "secret" not in text
    assert "hub_token" not in record
    assert record["train_file"] == "a.csv"
    assert record["lr_scheduler_type"] == "cosine"
    assert record["eval_strategy"] == "epoch"
    assert record["learning_rate"] == 2e-5
    assert record["lr_scheduler_kwargs"] == {"floor": "inf", "of": [1, 2]}
    names = {field.name for cls in (DataOptions, RunOptions) for field in dataclasses.fields(cls)}
    assert set(record) == names - {"hub_token"}


def test_resolved_wants_instances():
    for value in (DataOptions, {"seed": 1}):
        with pytest.raises(TypeError, match="expected a dataclass instance"):
            resolved(value)


def test_errors_say_what_why_and_what_to_type():
    error = NlpxferError("It broke.", why="a flaw", fix="mend it", available=[f"n{i}" for i in range(42)])
    lines = str(error).splitlines()
    assert lines[0] == error.what == "It broke."
    assert lines[1] == "  Likely reason: a flaw"
    assert lines[2].startswith("  Available: n0, n1,")
    assert lines[2].endswith("n39, and 2 more")
    assert lines[3] == "  Try: mend it"
    assert str(NlpxferError("Only this.")) == "Only this."
    assert ConfigError.from_faults(["one"]).what == "one"
    assert nearest("temprature", ["temperature", "seed"]) == "temperature"
    assert nearest("zzz", ["temperature", "seed"]) == ""


@pytest.mark.parametrize(
    ("name", "builtin", "code"),
    [
        ("ConfigError", ValueError, 2),
        ("DataNotFoundError", FileNotFoundError, 2),
        ("LabelError", ValueError, 2),
        ("CheckpointNotFoundError", FileNotFoundError, 2),
        ("OutputExistsError", FileExistsError, 2),
        ("NoSpaceError", OSError, 2),
        ("StaleCacheError", ValueError, 2),
        ("LaunchError", RuntimeError, 2),
        ("NotFiniteError", FloatingPointError, 2),
        ("ResumeError", ValueError, 2),
        ("PushError", RuntimeError, 2),
        ("Interrupted", NlpxferError, 75),
    ],
)
def test_errors_are_also_those_of_python(name, builtin, code):
    import nlpxfer.errors

    error = getattr(nlpxfer.errors, name)("It broke.", fix="mend it")
    assert isinstance(error, NlpxferError)
    assert isinstance(error, builtin)
    assert error.exit_code == code
    assert "mend it" in str(error)
