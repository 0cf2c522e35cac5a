"""One step of one rank: what is refused changes nothing, and loss terms and penalties meet the right tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from megatron_cpt.architecture.families import read_architecture
from megatron_cpt.data.micro_batch import MicroBatch, cut_sequence, on_this_rank
from megatron_cpt.model.owned_parameters import OwnedParameter, owned_parameters
from megatron_cpt.train.state import TrainState, build_train_state, unwrap
from megatron_cpt.train.step import train_step
from megatron_cpt.train.step_sums import StepSums
from tests.parity.tiny_models import save_tiny_model
from tests.unit.model.conftest import make_config, single_rank  # noqa: F401 - a fixture

SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("base_tied", tmp_path_factory.mktemp("models"))


def batch() -> MicroBatch:
    tokens = (torch.arange(SEQ_LENGTH + 1) * 3 % 50).expand(2, -1)
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(2, SEQ_LENGTH),
        "position_ids": torch.arange(SEQ_LENGTH).expand(2, -1),
    }


def build(model_dir: Path, dtype: str = "fp32", *, distributed_optimizer: bool = True) -> TrainState:
    config = make_config(
        model_dir, precision={"dtype": dtype}, parallel={"distributed_optimizer": distributed_optimizer}
    )
    return build_train_state(config, read_architecture(model_dir))


class Factor:
    """A loss term: `factor` times the sum of the logits."""

    name = "factor"
    sequence_axes: ClassVar[dict[str, int | None]] = {}

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def before_step(self, micro_batches: Sequence[MicroBatch]) -> None: ...

    def __call__(self, logits_sbv: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        assert logits_sbv.shape == (SEQ_LENGTH, 2, 512)
        return logits_sbv.float().sum() * self.factor


class Gradient:
    """A penalty whose gradient is `value` everywhere."""

    name = "gradient"

    def __init__(self, value: float) -> None:
        self.value = value

    def add_gradients(self, parameters: Sequence[OwnedParameter]) -> None:
        for parameter in parameters:
            parameter.gradient.add_(self.value)


def parameters(state: TrainState) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in state.chunks[0].parameters()]


def changed(state: TrainState, before: list[torch.Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, parameters(state), strict=True))


@pytest.mark.parametrize("bad", ["term", "penalty"])
def test_a_step_without_a_finite_gradient_changes_nothing(model_dir: Path, bad: str) -> None:
    state = build(model_dir)
    before = parameters(state)
    state.penalties = (Gradient(math.nan),) if bad == "penalty" else ()
    result = train_step(state, [batch()], terms=(Factor(math.inf),) if bad == "term" else ())
    assert result.refused is not None and "not finite" in result.refused
    assert not changed(state, before)
    state.penalties = ()
    assert train_step(state, [batch()]).refused is None
    assert changed(state, before)


def test_a_refused_step_changes_nothing_and_keeps_the_reason(model_dir: Path) -> None:
    state = build(model_dir)
    before = parameters(state)
    seen: list[tuple[float, float]] = []

    def refuse(loss: float, grad_norm: float) -> str:
        seen.append((loss, grad_norm))
        return "too steep"

    result = train_step(state, [batch()], refuse=refuse)
    assert result.refused == "too steep" and not changed(state, before)
    assert seen == [(pytest.approx(result.loss), result.grad_norm)]


def test_a_loss_term_is_reported_apart_from_the_cross_entropy(model_dir: Path) -> None:
    plain = train_step(build(model_dir), [batch()])
    zero = train_step(build(model_dir), [batch()], terms=(Factor(0.0),))
    more = train_step(build(model_dir), [batch()], terms=(Factor(0.5),))
    assert (zero.loss, zero.grad_norm) == (
        pytest.approx(plain.loss, abs=1e-6),
        pytest.approx(plain.grad_norm, rel=1e-5),
    )
    assert more.loss == pytest.approx(plain.loss, abs=1e-6)
    assert plain.terms == {} and zero.terms == {"factor": 0.0} and more.terms["factor"] != 0.0
    assert abs(more.grad_norm - plain.grad_norm) > 0.1 * plain.grad_norm


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_a_penalty_sees_every_parameter_once_with_its_fp32_values(
    model_dir: Path, dtype: str, distributed_optimizer: bool
) -> None:
    state = build(model_dir, dtype, distributed_optimizer=distributed_optimizer)
    seen: list[OwnedParameter] = []

    class Watch(Gradient):
        def add_gradients(self, parameters: Sequence[OwnedParameter]) -> None:
            seen.extend(parameters)
            super().add_gradients(parameters)

    state.penalties = (Watch(100.0),)
    result = train_step(state, [batch()], refuse=lambda loss, norm: "look only")
    model = unwrap(state.chunks[0])
    assert len({parameter.name for parameter in seen}) == len(seen) == len(list(model.parameters()))
    assert "decoder.layers.3.mlp.linear_fc1.layer_norm_weight" in {parameter.name for parameter in seen}
    total = 0
    for parameter in seen:
        assert parameter.values.dtype == parameter.gradient.dtype == torch.float32
        assert (parameter.start, parameter.stop) == (0, math.prod(parameter.shape))
        total += parameter.stop
    embedding = next(p for p in seen if p.name == "embedding.word_embeddings.weight")
    assert torch.equal(embedding.values.view(512, 32).to(model.embedding.word_embeddings.weight.dtype),
                       model.embedding.word_embeddings.weight)  # fmt: skip
    assert result.grad_norm == pytest.approx(100.0 * math.sqrt(total), rel=0.01)
    assert len(owned_parameters([model], state.optimizer)) == len(seen)


def test_sums_survive_the_one_vector_they_travel_in() -> None:
    template = StepSums.zeros(2, 3, torch.device("cpu"))
    packed = torch.arange(10, dtype=torch.float64)
    sums = template.unpack(packed)
    assert (float(sums.loss), float(sums.tokens)) == (0.0, 1.0)
    assert [sums.terms.tolist(), sums.source_losses.tolist(), sums.source_tokens.tolist()] == [
        [2.0, 3.0],
        [4.0, 5.0, 6.0],
        [7.0, 8.0, 9.0],
    ]
    assert torch.equal(sums.pack(), packed)


def test_context_parallel_ranks_together_hold_each_token_once() -> None:
    tokens = torch.arange(16).expand(2, -1)
    parts = [cut_sequence(tokens, 1, rank, 4) for rank in range(4)]
    assert [part[0].tolist() for part in parts] == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert torch.equal(cut_sequence(tokens.T, 0, 1, 4), parts[1].T)


def test_a_tensor_that_no_table_names_is_an_error() -> None:
    cpu = torch.device("cpu")
    whole: MicroBatch = batch() | {"term_tensors": {"weights": torch.ones(2, SEQ_LENGTH), "table": torch.ones(7)}}
    axes = {"weights": 1, "table": None}
    cut = on_this_rank(whole, cpu, 0, 2, axes)
    assert {name: tuple(t.shape) for name, t in cut["term_tensors"].items()} == {"weights": (2, 16), "table": (7,)}
    assert cut["labels"].shape == (2, 16)
    with pytest.raises(KeyError, match="table"):
        on_this_rank(whole, cpu, 0, 2, {"weights": 1})
    with pytest.raises(KeyError, match="surprise"):
        on_this_rank(batch() | {"surprise": torch.ones(2)}, cpu, 0, 2, {})  # type: ignore[typeddict-unknown-key]
