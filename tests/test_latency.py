"""Latency: percentiles of known times, who is asked when, and real models that answer as they do elsewhere."""

import numpy as np
import pytest
import torch
from tiny import LABELS, make_rows

from nlpxfer.checkpoint import load_classifier
from nlpxfer.config.long_texts import LongTexts
from nlpxfer.data.schema import LabelSchema
from nlpxfer.errors import ConfigError
from nlpxfer.evaluate.latency import BATCH_CALLS, ONE_ROW_CALLS, Latency, Stages, latency_facts, measure_latency


class Clock:
    """Time passes only where a stage says so."""

    def __init__(self):
        self.now, self.asked = 0.0, []

    def __call__(self):
        return self.now

    def stages(self, name, tokenising, computing):
        """The n-th call takes the n-th of these seconds, and the last of them from then on."""
        calls = {"tokenise": 0, "compute": 0}

        def stage(kind, seconds):
            def run(given):
                if kind == "tokenise":
                    self.asked.append((name, given[0][0]))
                self.now += seconds[min(calls[kind], len(seconds) - 1)]
                calls[kind] += 1
                return given

            return run

        return Stages(tokenise=stage("tokenise", tokenising), compute=stage("compute", computing))


def requests(count, rows=1):
    return [([f"text {index}"] * rows, None) for index in range(count)]


def test_percentiles_by_hand():
    """Two warm-up calls that take long are left out; 21 calls take 1 to 21 ms, so the median is 11 and p95 is 20."""
    clock = Clock()
    times = [9.0, 9.0, *(np.arange(1, 22) / 1000)]
    model = clock.stages("a", [0.5, 0.5, 0.002], times)
    found = measure_latency({"a": model}, requests(21), calls=21, clock=clock)["a"]
    assert found.rows == 1
    assert found.calls == 21
    assert [found.p50_ms, found.p95_ms] == pytest.approx([11.0, 20.0])
    assert [found.total_p50_ms, found.total_p95_ms] == pytest.approx([13.0, 22.0])


def test_a_batch_counts_its_rows():
    clock = Clock()
    found = measure_latency({"a": clock.stages("a", [0.01], [0.03])}, requests(1, rows=10), calls=3, clock=clock)["a"]
    expected = Latency(p50_ms=3.0, p95_ms=3.0, total_p50_ms=4.0, total_p95_ms=4.0, rows=10, calls=3)
    assert vars(found) == pytest.approx(vars(expected))


def test_models_take_turns_on_the_same_requests():
    clock = Clock()
    models = {name: clock.stages(name, [0.0], [1.0]) for name in "ab"}
    measure_latency(models, requests(2), calls=3, warmup=1, clock=clock)
    texts = ["text 0", "text 0", "text 1", "text 0"]  # the warm-up, and the first request again when they run out
    assert clock.asked == [(name, text) for text in texts for name in "ab"]


@pytest.mark.parametrize(
    ("models", "asked", "calls", "warmup"),
    [({}, 1, 1, 0), ({"a"}, 0, 1, 0), ({"a"}, 1, 0, 0), ({"a"}, 1, 1, -1)],
)
def test_nothing_to_measure(models, asked, calls, warmup):
    stages = {name: Clock().stages(name, [0.0], [0.0]) for name in models}
    with pytest.raises(ConfigError, match="Cannot measure"):
        measure_latency(stages, requests(asked), calls=calls, warmup=warmup)


def test_requests_of_different_sizes_cannot_be_compared():
    with pytest.raises(ConfigError, match=r"of \[1, 2\] rows"):
        measure_latency({"a": Clock().stages("a", [0], [0])}, [*requests(1), *requests(1, rows=2)], calls=1)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_model_is_asked_as_it_is_elsewhere(family, tiny_checkpoint):
    """Long texts in windows; eval mode; the batch is that of the texts."""
    checkpoint = load_classifier(str(tiny_checkpoint(family, "classifier", dropout=0.5)), schema=LabelSchema(LABELS))
    seen = []
    checkpoint.model.train()
    checkpoint.model.register_forward_hook(lambda model, args, output: seen.append((model.training, output.logits)))
    plan = LongTexts(policy="sliding_window", window_overlap=2)
    stages = Stages.of(checkpoint.model, checkpoint.tokenizer, max_length=12, long_texts=plan)
    long = " ".join(row["text"] for row in make_rows(4))
    batch = stages.tokenise((["bread and cheese", long], None))
    assert batch["input_ids"].shape[1] <= 12
    assert len(batch["input_ids"]) > 2
    stages.compute(batch)
    stages.compute(batch)
    (training, first), (_, second) = seen
    assert not training
    assert torch.equal(first, second)
    assert first.shape == (len(batch["input_ids"]), 4)


def test_facts_of_few_texts():
    clock = Clock()
    found = latency_facts({"a": clock.stages("a", [0.0], [0.0])}, [f"text {index}" for index in range(5)])["a"]
    assert found["one_row"]["calls"] == ONE_ROW_CALLS
    assert (found["batched"]["calls"], found["batched"]["rows"]) == (BATCH_CALLS, 5)
    assert found["threads"] == torch.get_num_threads()
    assert {text for _, text in clock.asked} == {f"text {index}" for index in range(5)}
