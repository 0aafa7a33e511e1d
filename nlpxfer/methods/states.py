"""What a teacher computes before its logits, and the student's counterpart: read in the passes that training makes.

The student gets one more submodule while it trains, `StudentStates`: which of its states are compared with which of
the teacher's, and the projections that learn. A submodule, chosen over a module beside the student, because then the
optimizer, DDP, checkpoints and resuming treat projections like all other weights. `detach_states_` takes it off before
anything is saved for use. What is read goes out of the student's forward pass as `hidden_states`, so that DDP, which
follows the outputs back to the weights, sees that the projections took part.

States are read by hooks that exist for one pass. A hook that did not fire is an error: a term over nothing would be 0.

The teacher is no submodule of anything here: it runs frozen, in eval mode, without gradients, in the precision of the
student, on the batch that the student reads. Its logits still come from the cache.

Projections: one per pair of layers, without bias, always, starting at the identity where the widths are equal and as
an orthogonal map elsewhere. Always, because a student that is no slice of the teacher has a space of its own, whatever
its width; at the identity, because a slice starts in the teacher's space and there is nothing to find.

Sources: hidden states, Jiao et al. 2020 (TinyBERT), arXiv:1909.10351; relations, Wang et al. 2021 (MiniLMv2),
arXiv:2012.15828; sentence states: see `nlpxfer.losses.states`.

Shapes: B batch rows, W windows of them (W = B where no row has several), L tokens, H hidden, K rows compared with.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import Tensor, nn

from nlpxfer.checkpoint.attention import AttentionPlaces, attention_places, text_layers
from nlpxfer.checkpoint.fingerprint import tokenizer_fingerprint
from nlpxfer.checkpoint.head import deciding_token, head_of
from nlpxfer.checkpoint.student import choose_layers, model_layers
from nlpxfer.config.states import StatesPlan, parse_pairs
from nlpxfer.data.tokenise import WINDOWS_PER_ROW
from nlpxfer.errors import CheckpointError, ConfigError
from nlpxfer.losses.states import contrastive_loss, hidden_loss, relation_loss, relational_loss
from nlpxfer.methods.base import Batch, LossTerm, mean_by_row, model_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from nlpxfer.checkpoint.load import Checkpoint

STUDENT_STATES: Final = "student_states"
"""Name of the submodule that a student has only while it trains."""
TEACHER_STATES: Final = "teacher_states"
"""Column of a batch: the teacher's sentence state of each row, (B, H)."""
MOST_RELATION_HEADS: Final = 48
"""Relation heads of the paper for teachers of 768 numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StatesGuide:
    """A plan with the teacher that it is about.

    Attributes:
        plan: What is compared.
        teacher: Frozen classifier on its device; its states are read, its head takes no part.
        autocast: Type that matrix products compute in, as the student's; None: float32.
        others_KH: The teacher's sentence states of K rows, for the similarity loss; on the model's device.
    """

    plan: StatesPlan
    teacher: PreTrainedModel
    autocast: torch.dtype | None = None
    others_KH: Tensor | None = None

    def attach_(self, student: PreTrainedModel) -> None:
        """Give a student its `StudentStates`.

        Raises:
            ConfigError: A layer, a number of relation heads or a width does not exist in one of the two.
            CheckpointError: The family of one of the two has no list of blocks, or unknown attention.
        """
        made = StudentStates(self.plan, student, self.teacher)
        student.add_module(STUDENT_STATES, made.to(next(student.parameters()).device))

    def teacher_outputs(self, states: StudentStates, batch: Batch) -> dict[str, Tensor]:
        """Outputs of the teacher's modules by name, for the rows and tokens of a batch."""
        names = states.teacher_names
        known = inspect.signature(self.teacher.forward).parameters
        inputs = {name: value for name, value in model_inputs(batch).items() if name in known}
        nn.Module.eval(self.teacher)
        device = inputs["input_ids"].device.type
        with (
            torch.no_grad(),
            torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None),
            reading(self.teacher, names) as found,
        ):
            self.teacher(**inputs)
        require_fired(self.teacher, names, found)
        return found


class StudentStates(nn.Module):
    """The layers of a student that are compared with a teacher's, and the projections between them.

    Args:
        plan: What is compared.
        student: The student; it is read, never kept.
        teacher: Likewise.

    Raises:
        ConfigError, CheckpointError: See `StatesGuide.attach_`.
    """

    def __init__(self, plan: StatesPlan, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        super().__init__()
        self.plan = plan
        self.pairs: list[tuple[int, int]] = []
        self.hidden, self.similarity = nn.ModuleDict(), nn.ModuleDict()
        self.queries_keys_values: tuple[AttentionPlaces, AttentionPlaces] | None = None
        self.relation_heads = 0
        width, wanted = (int(model.config.get_text_config().hidden_size) for model in (student, teacher))
        if plan.hidden_weight:
            self.pairs = layer_pairs(plan.hidden_layers, student, teacher)
            self.blocks = model_layers(student)[0], model_layers(teacher)[0]
            self.hidden = nn.ModuleDict({str(layer): _projection(width, wanted) for layer, _ in self.pairs})
        if plan.relation_weight:
            self.queries_keys_values = _attention(plan, student, teacher)
            self.relation_heads = _relation_heads(plan.num_relation_heads, self.queries_keys_values)
        if plan.similarity_weight:
            self.similarity["0"] = _projection(_pooled_width(student), _pooled_width(teacher))

    @property
    def student_names(self) -> list[str]:
        """Modules of the student whose outputs are read."""
        return self._names(0)

    @property
    def teacher_names(self) -> list[str]:
        """Modules of the teacher whose outputs are read."""
        return self._names(1)

    def _names(self, side: int) -> list[str]:
        names = [f"{self.blocks[side]}.{pair[side]}" for pair in self.pairs]
        return names + (list(self.queries_keys_values[side].names) if self.queries_keys_values else [])

    def finish(self, found: Mapping[str, Tensor], pooled_WH: Tensor | None) -> tuple[Tensor, ...]:
        """What goes out of the student's forward pass: projected states, queries, keys and values, sentence state."""
        given = []
        for (layer, _), name in zip(self.pairs, self.student_names, strict=False):
            given.append(self.hidden[str(layer)](found[name].float()))
        if self.queries_keys_values is not None:
            given += self.queries_keys_values[0].split([found[name] for name in self.queries_keys_values[0].names])
        if pooled_WH is not None:
            given.append(self.similarity["0"](pooled_WH.float()))
        return tuple(given)

    def describe(self) -> dict[str, Any]:
        """For the report: which layers are compared with which, and the modules that are read."""
        facts: dict[str, Any] = {}
        if self.pairs:
            facts["hidden_layers"] = [f"{student}:{teacher}" for student, teacher in self.pairs]
        if self.queries_keys_values is not None:
            facts["num_relation_heads"] = self.relation_heads
        return facts | {"student_hooks": self.student_names, "teacher_hooks": self.teacher_names}


def require_comparable(plan: StatesPlan, student: Checkpoint, teacher: Checkpoint, *, pairs: bool = False) -> None:
    """Refuse early what training would fail at, or would get wrong.

    Args:
        plan: What is compared.
        student: Reads the texts; its tokens go to both.
        teacher: Reads them too.
        pairs: Whether they are pairs of texts, which some families tell apart by segment ids.

    Raises:
        ConfigError: States of tokens are compared, and the two read texts as different tokens, or only the teacher
            reads segment ids of pairs; or see `StatesGuide.attach_`.
        CheckpointError: See there.
    """
    if plan.reads_tokens and not _same_tokens(student.tokenizer, teacher.tokenizer):
        raise ConfigError(
            f"hidden_weight and relation_weight compare states token by token, but {student.name} and {teacher.name} "
            "have different tokenizers.",
            fix="leave them out: logits (kd_weight) and sentence states (similarity_weight) go between any two models",
        )
    segments = ["token_type_ids" in model.tokenizer.model_input_names for model in (student, teacher)]
    if plan.reads_tokens and pairs and segments == [False, True]:
        raise ConfigError(
            f"hidden_weight and relation_weight show the teacher the student's tokens, and {student.name} has no "
            f"segment ids, by which {teacher.name} tells the two texts of a pair apart.",
            fix="leave them out, or take a student of the teacher's family",
        )
    with torch.random.fork_rng(devices=[]):
        StudentStates(plan, student.model, teacher.model)


def _same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids; segment ids, which some families do not read, may be missing."""
    return tokenizer_fingerprint(one, inputs=False) == tokenizer_fingerprint(other, inputs=False)


def layer_pairs(text: str, student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[int, int]]:
    """Pairs of a student's and a teacher's layer, as `StatesPlan.hidden_layers` says; a layer of a mean is left out.

    Raises:
        ConfigError: A layer does not exist.
    """
    mine, theirs = text_layers(student), text_layers(teacher)
    if text == "auto":
        count = min(mine, theirs)
        origin = _cut_from(student, teacher) if _evenly(mine, count) == list(range(mine)) else None
        if origin is not None and origin[-1] == theirs - 1:
            return list(enumerate(origin))
        return list(zip(_evenly(mine, count), _evenly(theirs, count), strict=True))
    pairs = parse_pairs(text)
    wrong = [f"{s}:{t}" for s, t in pairs if not (0 <= s < mine and 0 <= t < theirs)]
    if wrong:
        raise ConfigError(
            f"hidden_layers: {', '.join(wrong)} names layers that do not exist.",
            fix=f"student 0 to {mine - 1}, teacher 0 to {theirs - 1}",
        )
    return pairs


def _evenly(total: int, count: int) -> list[int]:
    """`count` of `total` layers, evenly spaced, the last one among them."""
    return [total - 1] if count == 1 else choose_layers(total, count, "even")


def _cut_from(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int] | None:
    """The teacher's layer that each layer of the student is a copy of; None if one is of none."""
    mine, theirs = (list(model_layers(model)[1])[: text_layers(model)] for model in (student, teacher))
    found = [next((i for i, other in enumerate(theirs) if _same(layer, other)), None) for layer in mine]
    return None if None in found else cast("list[int]", found)


def _same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.shape == second[name].shape and torch.equal(value, second[name].to(value.device))
        for name, value in first.items()
    )


def _projection(width: int, wanted: int) -> nn.Linear:
    """A linear map without bias: the identity, or between unlike widths an orthogonal map."""
    made = nn.Linear(width, wanted, bias=False)
    if width == wanted:
        nn.init.eye_(made.weight)
    else:
        nn.init.orthogonal_(made.weight)
    return made


def _attention(
    plan: StatesPlan, student: PreTrainedModel, teacher: PreTrainedModel
) -> tuple[AttentionPlaces, AttentionPlaces]:
    """Queries, keys and values of the student's last layer, and of the teacher's layer that was chosen."""
    theirs = text_layers(teacher)
    layer = theirs - 1 if plan.relation_layer is None else plan.relation_layer
    if not 0 <= layer < theirs:
        raise ConfigError(f"relation_layer: the teacher has no layer {layer}.", fix=f"a number from 0 to {theirs - 1}")
    return attention_places(student, text_layers(student) - 1), attention_places(teacher, layer)


def _relation_heads(asked: int | None, places: tuple[AttentionPlaces, AttentionPlaces]) -> int:
    widths = [width for side in places for width in side.widths]
    common = math.gcd(*widths)
    if asked is None:
        return max(heads for heads in range(1, MOST_RELATION_HEADS + 1) if common % heads == 0)
    if common % asked:
        divisors = [str(heads) for heads in range(1, common + 1) if common % heads == 0]
        shown = "; ".join(", ".join(map(str, side.widths)) for side in places)
        raise ConfigError(
            f"num_relation_heads: {asked} does not divide the widths of queries, keys and values (student; teacher): "
            f"{shown}.",
            available=divisors,
        )
    return asked


def _pooled_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that reads the sentence state: the first one of the head."""
    parts = head_of(model)
    return next(iter(parts.transforms.values()), parts.final)


def _pooled_width(model: PreTrainedModel) -> int:
    return int(_pooled_layer(model).in_features)


def states_of(model: nn.Module) -> StudentStates | None:
    """The `StudentStates` of a student, whatever DDP put around it."""
    found = getattr(getattr(model, "module", model), STUDENT_STATES, None)
    return found if isinstance(found, StudentStates) else None


def detach_states_(model: nn.Module) -> None:
    """Take off what `StatesGuide.attach_` gave."""
    if states_of(model) is not None:
        delattr(model, STUDENT_STATES)


@contextmanager
def reading(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs of named modules; of a module that is called several times in a pass, the first."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:  # noqa: ANN401 - a hook
        def hook(module: nn.Module, arguments: object, output: Any) -> None:  # noqa: ANN401
            found.setdefault(name, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def require_fired(model: nn.Module, names: Sequence[str], found: Mapping[str, Tensor]) -> None:
    """Refuse a pass in which a module was not run, or gave something else than states of tokens.

    Raises:
        CheckpointError: Names the modules.
    """
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(
            f"{type(model).__name__}: these modules did not run, so their states could not be read: "
            f"{', '.join(missing)}.",
            why="a compiled or fused forward pass goes round them",
            fix="leave hidden_weight and relation_weight out",
        )
    flat = [name for name in names if found[name].dim() != 3]
    if flat:
        raise CheckpointError(
            f"{type(model).__name__}: the states of {', '.join(flat)} are not (rows, tokens, width).",
            why="an attention kernel that takes rows without padding is on",
        )


def student_outputs(model: nn.Module, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits of the windows of a batch, and what `StudentStates.finish` gives of the same pass.

    Raises:
        ConfigError: The student has no `StudentStates`.
        CheckpointError: A hook did not fire.
    """
    states, inner = states_of(model), cast("PreTrainedModel", getattr(model, "module", model))
    if states is None:
        raise ConfigError("The student was not prepared for these losses.", fix="method.adapt(model, fresh)")
    names, pooled = states.student_names, list[Tensor]()

    def give(module: nn.Module, arguments: object, output: Any) -> Any:  # noqa: ANN401
        require_fired(inner, names, found)
        if states.similarity and not pooled:
            raise CheckpointError(f"The head of {type(inner).__name__} did not run.")
        sentence = _deciding(inner, pooled[0], batch) if states.similarity else None
        output["hidden_states"] = states.finish(found, sentence)
        return output

    with reading(inner, names) as found:
        handles = [inner.register_forward_hook(give)]
        if states.similarity:
            handles.append(
                _pooled_layer(inner).register_forward_pre_hook(lambda _, arguments: pooled.append(arguments[0]))
            )
        try:
            output = model(**model_inputs(batch))
        finally:
            for handle in handles:
                handle.remove()
    return output.logits, output.hidden_states


def _deciding(model: PreTrainedModel, states: Tensor, batch: Batch) -> Tensor:
    """The state that decides: what the head reads, in decoders at the last token of the text; (W, H)."""
    if states.dim() == 2:
        return states
    last_W = deciding_token(batch["input_ids"], model.config.get_text_config().pad_token_id)
    return states[torch.arange(len(states), device=states.device), last_W]


def states_terms(guide: StatesGuide, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, LossTerm]]:
    """The student's logits (B, C), and the terms on states, from one pass of the student and one of the teacher."""
    logits_WC, given = student_outputs(model, batch)
    states, plan = cast("StudentStates", states_of(model)), guide.plan
    mask_WL, windows_B = batch["attention_mask"], batch.get(WINDOWS_PER_ROW)

    def by_row(values_W: Tensor) -> Tensor:
        return values_W if windows_B is None else mean_by_row(values_W[:, None], windows_B)[:, 0]

    taught = guide.teacher_outputs(states, batch) if plan.reads_tokens else {}
    remaining, terms = list(given), dict[str, LossTerm]()
    if plan.hidden_weight:
        losses = [
            hidden_loss(remaining.pop(0), taught[name], mask_WL) for name in states.teacher_names[: len(states.pairs)]
        ]
        terms["hidden"] = LossTerm(by_row(torch.stack(losses).mean(dim=0)), plan.hidden_weight)
    if plan.relation_weight and states.queries_keys_values is not None:
        places = states.queries_keys_values[1]
        theirs = places.split([taught[name] for name in places.names])
        losses = [
            relation_loss(remaining.pop(0), other, mask_WL, num_relation_heads=states.relation_heads)
            for other in theirs
        ]
        terms["relation"] = LossTerm(by_row(torch.stack(losses).mean(dim=0)), plan.relation_weight)
    if plan.similarity_weight:
        terms["similarity"] = LossTerm(_similarity(guide, remaining.pop(0), batch), plan.similarity_weight)
    logits_BC = logits_WC if windows_B is None else mean_by_row(logits_WC, windows_B)
    return logits_BC, terms


def _similarity(guide: StatesGuide, sentence_WH: Tensor, batch: Batch) -> Tensor:
    """Loss on the sentence states, the mean over a row's windows; shape B."""
    if guide.others_KH is None:
        raise ConfigError("similarity_weight: the teacher's sentence states are not there.")
    windows_B = batch.get(WINDOWS_PER_ROW)
    sentence_BH = sentence_WH if windows_B is None else mean_by_row(sentence_WH, windows_B)
    loss = contrastive_loss if guide.plan.similarity_loss == "contrastive" else relational_loss
    temperature = guide.plan.similarity_temperature
    return loss(sentence_BH, batch[TEACHER_STATES], guide.others_KH, temperature=temperature)
