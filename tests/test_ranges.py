"""Ranges instead of values: where they come from, how they are typed, and which are refused."""

import dataclasses
import re

import pytest
from processes import ROOT
from recipe_runs import option_classes
from transformers.trainer_utils import SchedulerType

from nlpxfer.config import DataOptions, Range, RunOptions, parse
from nlpxfer.config.ranges import FIXED_OPTIONS, SEARCHED_ARGUMENTS, with_values
from nlpxfer.errors import ConfigError

FINETUNE = option_classes("finetune")
RATE = "{low: 1e-5, high: 5e-4, log: true}"


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and gives its path."""

    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def ranges_of(*words, types=FINETUNE):
    return parse(types, list(words))[-1].ranges


def faults_of(*words, types=FINETUNE):
    with pytest.raises(ConfigError) as caught:
        parse(types, list(words))
    return list(caught.value.faults)


def test_the_file_and_the_command_line_mean_the_same(config):
    lines = {
        "learning_rate": RATE,
        "num_train_epochs": "{choices: [2, 4, 8]}",
        "per_device_train_batch_size": "{low: 8, high: 64}",
        "linear_probe": "{choices: [true, no]}",
        "class_weights": "{choices: [none, balanced]}",
        "dropout": "{choices: [null, 0.1]}",
        "lr_scheduler_type": "{choices: [linear, cosine]}",
        "num_trials": "20",
    }
    from_file = ranges_of(config("\n".join(f"{key}: {value}" for key, value in lines.items())))
    from_words = ranges_of(*(f"--{key}={value}" for key, value in lines.items()))
    expected = {
        "learning_rate": Range(1e-5, 5e-4, log=True),
        "num_train_epochs": Range(choices=(2.0, 4.0, 8.0)),
        "per_device_train_batch_size": Range(8, 64),
        "linear_probe": Range(choices=(True, False)),
        "class_weights": Range(choices=("none", "balanced")),
        "dropout": Range(choices=(None, 0.1)),
        "lr_scheduler_type": Range(choices=(SchedulerType.LINEAR, SchedulerType.COSINE)),
    }
    assert from_file == from_words == expected
    assert isinstance(from_file["per_device_train_batch_size"].low, int)
    assert isinstance(from_file["num_train_epochs"].choices[0], float)
    assert all(isinstance(choice, SchedulerType) for choice in from_file["lr_scheduler_type"].choices)
    assert from_file["lr_scheduler_type"].plain() == {"choices": ["linear", "cosine"]}
    assert from_file["learning_rate"].plain() == {"low": 1e-5, "high": 5e-4, "log": True}


def test_the_example_of_the_documentation():
    path = ROOT / "recipes" / "configs" / "search" / "finetune.yaml"
    (example,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs" / "search.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert path.read_text().endswith(f"\n\n{example}")
    options = parse(FINETUNE, [str(path)])[-1]
    assert (options.num_trials, options.search_timeout, len(options.ranges)) == (20, 3600.0, 4)


def test_an_option_with_a_range_has_its_default(config):
    _, plan, options = parse(
        FINETUNE, [config(f"learning_rate: {RATE}\nfocal_gamma: {{low: 1, high: 2}}\nnum_trials: 3")]
    )
    assert (options.learning_rate, plan.focal_gamma, options.num_trials) == (2e-5, 0.0, 3)


def test_the_command_line_wins_over_the_file(config):
    path = config(
        f"learning_rate: {RATE}\nweight_decay: 0.1\nnum_trials: 4\nlabel_smoothing_factor: {{low: 0, high: 0.2}}"
    )
    options = parse(FINETUNE, [path, "--learning_rate", "3e-5", "--weight_decay", "{low: 0, high: 0.3}"])[-1]
    assert options.learning_rate == 3e-5
    assert options.ranges == {"weight_decay": Range(0.0, 0.3), "label_smoothing_factor": Range(0.0, 0.2)}
    off = ["--learning_rate", "3e-5", "--label_smoothing_factor", "0", "--num_trials", "0"]
    assert parse(FINETUNE, [path, *off])[-1].ranges == {}
    (fault,) = faults_of(path, *off[:-2])
    assert fault.startswith("num_trials: no option has a range to try")


@pytest.mark.parametrize("word", ["true", "True", "yes"])
def test_words_for_true_are_those_of_other_switches(word, config):
    text = f"learning_rate: {RATE.replace('true', word)}\nnum_trials: 2"
    assert ranges_of(config(text))["learning_rate"] == Range(1e-5, 5e-4, log=True)


@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ("learning_rate={low: 5e-4, high: 1e-5}", "learning_rate: low 0.0005 is not below high 1e-05"),
        ("learning_rate={low: 1e-4, high: 1e-4}", "learning_rate: low 0.0001 is not below high 0.0001"),
        ("weight_decay={low: 0, high: 1, log: true}", "weight_decay: log needs a low above 0, not 0.0"),
        ("weight_decay={low: 0, high: 1, log: maybe}", "weight_decay: log: 'maybe' is not true or false"),
        ("weight_decay={low: 0}", "weight_decay: a range has low and high, or choices"),
        ("weight_decay={log: true}", "weight_decay: a range has low and high, or choices"),
        ("weight_decay={low: null, high: 1}", "weight_decay: low: it has no value; write one, or leave the key out"),
        ("weight_decay={lo: 0, high: 1}", "weight_decay: 'lo' is no part of a range; did you mean low?"),
        ("weight_decay={low: 0, high: [1]}", "weight_decay: high is a list"),
        ("weight_decay={low: 0, high: much}", "weight_decay: high: invalid float value: 'much'"),
        ("weight_decay={low: 0, high: inf}", "weight_decay: high: inf is not a finite number"),
        ("weight_decay={choices: 0.1}", "weight_decay: choices is no list"),
        ("weight_decay={choices: [0.1]}", "weight_decay: choices needs two or more different values"),
        ("weight_decay={choices: [0.1, 0.10]}", "weight_decay: choices needs two or more different values"),
        ("weight_decay={choices: [0.1, x]}", "weight_decay: choices: invalid float value: 'x'"),
        ("weight_decay={choices: [0, 1], low: 0}", "weight_decay: a range has low and high, or choices, not both"),
        ("gradient_accumulation_steps={low: 1, high: 2.5}",
         "gradient_accumulation_steps: high: invalid int value: '2.5'"),
        ("linear_probe={low: 0, high: 1}", "linear_probe: it is no number: write {choices: [...]}"),
        ("pooling={low: own, high: mean}", "pooling: it is no number: write {choices: [...]}"),
        ("pooling={choices: [own, max]}",
         "pooling: choices: invalid choice: 'max' (choose from 'auto', 'own', 'mean')"),
        ("train_sampling_strategy={low: a, high: b}",
         "train_sampling_strategy: high: invalid choice: 'b' (choose from 'group_by_length', 'random')"),
        ("dropout={low: 0, high: 1.5}", "dropout: 1.5 is not in [0, 1)"),
        ("focal_gamma={choices: [0, -1]}", "focal_gamma: -1.0 is not a finite number of at least 0"),
        ("optim={choices: [sgd, best]}", "optim: choices: invalid choice: 'best' (choose from"),
        ("temprature={low: 1, high: 2}", "temprature: unknown option"),
        ("deepspeed={choices: [a, b]}", "deepspeed: not supported"),
        ("seed={low: 1, high: 5}", "seed: it cannot be a range: trials must not differ in it"),
        ("output_dir={choices: [a, b]}", "output_dir: it cannot be a range: trials must not differ in it"),
        ("hub_model_id={choices: [a, b]}", "hub_model_id: it cannot be a range: trials must not differ in it"),
        ("train_file={choices: [a, b]}", "train_file: it cannot be a range: all trials must see the same rows"),
        ("max_length={low: 8, high: 64}", "max_length: it cannot be a range: all trials must see the same rows"),
        ("model_name_or_path={choices: [a, b]}", "model_name_or_path: it cannot be a range: it is a free text"),
    ],
)  # fmt: skip
def test_a_bad_range_is_refused(option, fault):
    found = faults_of(f"--{option}", "--num_trials", "2", "--adam_beta1", "{low: 0.8, high: 0.9}")
    assert fault in found[-1]
    assert len(found) == 1 + ("low: a" in option)


FIXED = {
    "adapter: {choices: [lora, dora]}": ("adapters", "each kind has options of its own"),
    "adapter_target_modules: {choices: [query, value]}": ("adapters", "its value is a list"),
    "search: {choices: [true, false]}": ("distill", "it is another search"),
    "disagreements: {choices: [true, false]}": ("distill", "it does not change what is learnt"),
}


@pytest.mark.parametrize("line", FIXED)
def test_what_no_trial_can_vary_is_refused(line, config):
    recipe, reason = FIXED[line]
    with pytest.raises(ConfigError, match=f"{line.partition(':')[0]}: it cannot be a range: {reason}"):
        parse(option_classes(recipe), [config(f"{line}\nnum_trials: 2")])


DETAILS = {
    "a number": ["--relation_weight", "{low: 0.1, high: 1}", "--relation_layer", "1"],
    "a word": ["--similarity_weight", "{low: 0.1, high: 1}", "--similarity_loss", "relational"],
    "pairs": ["--hidden_weight", "{choices: [0.5, 1.0]}", "--hidden_layers", "0:1"],
    "two": ["--hidden_weight", "{choices: [0.5, 1.0]}", "--hidden_layers", "0:1", "--relation_layer", "1",
            "--relation_weight", "{choices: [2.0, 1.0]}"],
}  # fmt: skip


@pytest.mark.parametrize("case", DETAILS)
def test_a_weight_that_is_searched_has_details_of_its_own(case):
    words = [*DETAILS[case], "--num_trials", "2"]
    _, plan, options = parse(option_classes("distill"), words)
    assert all(getattr(plan, name) in found for name, found in options.ranges.items())
    wrong = [word.replace("0.1", "0").replace("0.5", "0.0") for word in words]
    with pytest.raises(ConfigError, match="does nothing without"):
        parse(option_classes("distill"), wrong)


IDLE = {
    "distill --static_dim={low: 64, high: 256}": "static_dim: has no effect without --student static",
    "distill --static_num_train_epochs={low: 1, high: 5}":
        "static_num_train_epochs: has no effect without --student static",
    "finetune --linear_probe=false --linear_probe_size={low: 0, high: 1}":
        "linear_probe_size: has no effect without --linear_probe true",
    "finetune --linear_probe={choices: [true, false]} --linear_probe_size={low: 0, high: 1}": None,
    "distill --student=static --static_dim={low: 64, high: 256}": None,
}  # fmt: skip


@pytest.mark.parametrize("line", IDLE)
def test_a_range_waits_for_a_switch_as_a_value_does(line, config):
    recipe, *others, searched = line.split(" --")
    types, others = option_classes(recipe), [f"--{word}" for word in others]
    file = config(searched.replace("=", ": ", 1))
    for words in ([*others, f"--{searched}"], [file, *others]):
        words += ["--num_trials", "2"]
        if IDLE[line] is None:
            assert searched.partition("=")[0] in ranges_of(*words, types=types)
        else:
            assert IDLE[line] in faults_of(*words, types=types)[0]


def test_all_faults_are_told_at_once_and_where_they_stand(config):
    path = config("learning_rate: {low: 1, high: 0.1}\nseed: {choices: [1, 2]}\nnum_trials: x")
    assert faults_of(path, "--dropout", "{low: 0.1, high: 2}", "--num_seeds", "0", "--focal_gamma={lo: 1, hi: 2}") == [
        "learning_rate: low 1.0 is not below high 0.1 (in config.yaml)",
        "seed: it cannot be a range: trials must not differ in it (in config.yaml)",
        "num_trials: invalid int value: 'x' (in config.yaml)",
        "focal_gamma: 'lo' is no part of a range; did you mean low?",
        "focal_gamma: 'hi' is no part of a range; did you mean high?",
        "num_seeds: 0 is below 1",
        "dropout: 2.0 is not in [0, 1)",
    ]


def test_values_that_exclude_each_other_are_seen_before_a_trial_has_both():
    both = ["--class_weights", "{choices: [none, balanced]}", "--logit_adjustment", "{low: 0, high: 1}"]
    wrong = "class_weights, logit_adjustment: both make rare classes count more; use one of them"
    assert faults_of(*both, "--num_trials", "5") == [wrong]
    assert faults_of(*both[:2], "--logit_adjustment", "0.5", "--num_trials", "2") == [wrong]
    assert ranges_of(*both[:2], "--num_trials", "2")


def test_a_search_as_a_whole():
    assert faults_of("--learning_rate", RATE, "--dropout", "{low: 0, high: 0.1}") == [
        "learning_rate, dropout: a range without a number of trials; add num_trials, such as 20"
    ]
    (fault,) = faults_of("--num_trials", "5")
    assert fault.startswith("num_trials: no option has a range to try")
    grid = ["--linear_probe", "{choices: [true, false]}", "--num_trained_layers", "{low: 1, high: 3}"]
    assert faults_of(*grid, "--num_trials", "7") == ["num_trials: 7 is more than the 6 combinations of the ranges"]
    assert len(ranges_of(*grid, "--num_trials", "6")) == 2
    epochs = ["--num_train_epochs", "{low: 1, high: 3}", "--num_trials", "2"]
    assert faults_of(*epochs, "--max_steps", "5") == ["num_train_epochs: does nothing beside max_steps"]
    assert faults_of("--learning_rate", RATE, "--num_trials", "-1") == ["num_trials: -1 is negative"]
    assert faults_of("--search_timeout", "5") == ["search_timeout: has no effect without num_trials"]
    assert faults_of("--learning_rate", RATE, "--num_trials", "3", "--search_timeout", "0") == [
        "search_timeout: 0.0 is not positive"
    ]


def test_which_options_of_a_run_may_vary():
    names = {f.name for f in dataclasses.fields(RunOptions)}
    assert names >= FIXED_OPTIONS | SEARCHED_ARGUMENTS
    number = "{low: 0.01, high: x}"
    fixed = [f.name for f in dataclasses.fields(DataOptions)]
    fixed += [*FIXED_OPTIONS, "seed", "data_seed", "report_to", "hub_private_repo", "logging_first_step", "eval_steps"]
    for name in fixed:
        assert "it cannot be a range" in faults_of(f"--{name}", number, types=(DataOptions, RunOptions))[0], name
    for name in (*SEARCHED_ARGUMENTS, "weight_decay", "layer_decay", "dropout", "num_trained_layers", "max_grad_norm"):
        found = faults_of(f"--{name}", number, types=(DataOptions, RunOptions))
        assert not [fault for fault in found if "it cannot be a range" in fault], name


@pytest.mark.parametrize(("key", "own"), [("finetune", "focal_gamma"), ("distill", "kd_weight")])
def test_values_of_a_trial_reach_the_class_that_holds_them(key, own):
    _, plan, options = parse(option_classes(key), [])
    changed, tried = with_values(options, plan, {"learning_rate": 0.5, own: 0.75})
    assert (changed.learning_rate, getattr(tried, own)) == (0.5, 0.75)
    assert (options.learning_rate, getattr(plan, own)) != (0.5, 0.75)


def test_a_mapping_that_an_option_takes_as_its_value_is_no_range(config):
    options = parse(FINETUNE, [config("lr_scheduler_kwargs: {num_cycles: 2}\nlr_scheduler_type: cosine")])[-1]
    assert options.lr_scheduler_kwargs == {"num_cycles": 2}
    assert options.ranges == {}
    assert ranges_of("--text_column", "{text}") == {}
