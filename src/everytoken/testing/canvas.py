"""What every canvas sampler promises, on a tiny network that looks both ways.

Inherit the battery and name samplers; each gives examples for rows of 12 open positions (``CanvasSampler.examples``)::

    from everytoken.testing.canvas import CanvasConformance
    from mypackage import MySampler

    class TestMySampler(CanvasConformance):
        samplers = (MySampler,)
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from ..core.errors import BadInputError, UnsupportedModelError
from ..decoding.canvas.base import CanvasSampler
from ..decoding.canvas.model import CanvasModel
from ..decoding.canvas.trajectory import Trajectory
from .models import tiny_llama

VOCAB, MASK, LENGTH = 11, 10, 12


class TinyDenoiser(nn.Module):
    """One layer of attention over all positions, with relative positions in its scores.

    Args:
        peak: scales the logits; large values saturate every probability at 1.
        shift: row i predicts position i + 1.
    """

    def __init__(self, seed: int = 0, peak: float = 3.0, shift: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.embed, self.mix, self.head = drawn(VOCAB, 16), drawn(16, 16), drawn(16, VOCAB)
        self.near = drawn(129)
        self.peak = peak
        self.config = PreTrainedConfig(vocab_size=VOCAB, mask_token_id=MASK, max_position_embeddings=64)
        self.config.shift_logits = shift
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        self.calls += 1
        x = self.embed[input_ids]
        place = torch.arange(input_ids.shape[1])
        scores = x @ self.mix @ x.transpose(1, 2) / 16 + self.near[place[:, None] - place + 64]
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, -1e9)
        hidden = torch.tanh(x + scores.softmax(-1) @ x)
        logits = self.peak * (hidden @ self.head)
        if self.config.shift_logits:
            logits = logits.roll(-1, 1)
        return type("Output", (), {"logits": logits})()


class CanvasConformance:
    """The battery; see the module's docstring."""

    samplers: ClassVar[tuple[type[CanvasSampler], ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "sampler" in metafunc.fixturenames:
            cases = [
                pytest.param(made, id=f"{kind.__name__}, {name}")
                for kind in self.samplers
                for name, made in kind.examples().items()
            ]
            metafunc.parametrize("sampler", cases)

    def model(self, **settings: Any) -> Any:
        """The network that samplers are tried on."""
        return TinyDenoiser(**settings)

    def prompts(self, rows: int = 3, length: int = 5) -> torch.Tensor:
        return torch.randint(VOCAB - 1, (rows, length), generator=torch.Generator().manual_seed(1))

    def made(self, sampler: CanvasSampler, **changes: Any) -> CanvasSampler:
        return dataclasses.replace(sampler, **({"gen_length": LENGTH} | changes))

    def run(self, sampler: CanvasSampler, model: Any = None, rows: int = 3, **arguments: Any) -> Trajectory:
        arguments = {"seeds": range(rows)} | arguments
        found: Trajectory = sampler(self.model() if model is None else model, self.prompts(rows), **arguments)
        return found

    # -- the record ----------------------------------------------------------------------------------------------------
    def test_only_open_positions_are_written(self, sampler: CanvasSampler) -> None:
        for peak in (3.0, 1e4):  # probabilities that all round to 1 are equal: ties
            found = self.run(self.made(sampler), self.model(peak=peak))
            assert torch.equal(found.final_ids[:, :5], self.prompts())
            assert not bool((found.final_ids == MASK).any())
            assert torch.equal(found.editable.sum(1), torch.full((3,), LENGTH))

    def test_the_record_adds_up(self, sampler: CanvasSampler) -> None:
        model = self.model()
        found = self.run(self.made(sampler), model)
        assert torch.equal(found.counts.sum(1), found.editable.sum(1))
        assert bool(((found.fix_step >= 0) == found.editable).all())
        assert bool((found.fix_step < found.steps).all())
        assert bool(((found.choice_prob > 0) == found.editable).all()) and bool((found.choice_prob <= 1 + 1e-6).all())
        stats = self.made(sampler).stats
        assert stats.target_forwards == 0  # another object has made no call

    def test_every_state_can_be_replayed(self, sampler: CanvasSampler) -> None:
        found = self.run(self.made(sampler))
        states = list(found.states())
        assert len(states) == found.steps + 1
        assert torch.equal(states[0], found.final_ids.masked_fill(found.editable, MASK))
        assert torch.equal(states[-1], found.final_ids)
        for number, state in enumerate(states):
            assert torch.equal(state, found.state(number))
            assert torch.equal(state[~found.editable], found.final_ids[~found.editable])
        opened = torch.stack([(state == MASK).sum(1) for state in states], 1)
        assert torch.equal(-opened.diff(dim=1), found.counts)

    def test_replaying_gives_the_recorded_probabilities(self, sampler: CanvasSampler) -> None:
        if getattr(sampler, "cfg_scale", 0):
            pytest.skip("guidance changes the distribution")
        model = self.model()
        found = self.run(self.made(sampler), model)
        wrapped = CanvasModel(model, MASK)
        for step, state in enumerate(found.states()):
            fixed = found.fix_step == step
            if bool(fixed.any()):
                with torch.no_grad():
                    probs = wrapped.logits(state, None, fixed).softmax(-1)
                again = probs.gather(1, found.final_ids[fixed][:, None])[:, 0]
                torch.testing.assert_close(again, found.choice_prob[fixed], rtol=1e-5, atol=1e-6)

    def test_rows_can_be_taken_out(self, sampler: CanvasSampler) -> None:
        found = self.run(self.made(sampler))
        for row, part in ((2, found.rows(torch.tensor([2]))), (1, found.rows(slice(1, 2)))):
            for whole, own in zip(found.states(), part.states(), strict=True):
                assert torch.equal(whole[row : row + 1], own)

    # -- batches and seeds ---------------------------------------------------------------------------------------------
    def test_a_row_does_not_depend_on_its_batch(self, sampler: CanvasSampler) -> None:
        together = self.run(self.made(sampler))
        for row in range(3):
            alone = self.made(sampler)(self.model(), self.prompts()[row : row + 1], seeds=[row])
            assert torch.equal(alone.final_ids[0], together.final_ids[row])
            assert torch.equal(alone.fix_step[0], together.fix_step[row])

    def test_a_generator_decides_all(self, sampler: CanvasSampler) -> None:
        one, two = (
            self.run(self.made(sampler), seeds=None, generator=torch.Generator().manual_seed(7)) for _ in range(2)
        )
        assert torch.equal(one.final_ids, two.final_ids) and torch.equal(one.choice_prob, two.choice_prob)

    def test_padding_changes_nothing(self, sampler: CanvasSampler) -> None:
        bare = self.run(self.made(sampler))
        ids = torch.nn.functional.pad(self.prompts(), (4, 0), value=0)
        mask = torch.ones_like(ids)
        mask[:, :4] = 0
        padded = self.made(sampler)(self.model(), ids, attention_mask=mask, seeds=range(3))
        assert torch.equal(padded.final_ids[:, 4:], bare.final_ids)
        torch.testing.assert_close(padded.choice_prob[:, 4:], bare.choice_prob, rtol=1e-4, atol=1e-5)

    def test_shifted_logits_are_moved_back(self, sampler: CanvasSampler) -> None:
        if getattr(sampler, "block_length", None) or getattr(sampler, "cfg_scale", 0):
            pytest.skip("tested without blocks")
        plain, shifted = self.run(self.made(sampler)), self.run(self.made(sampler), self.model(shift=True))
        assert torch.equal(plain.final_ids, shifted.final_ids)

    # -- what users see ------------------------------------------------------------------------------------------------
    def test_counters_traces_and_copies(self, sampler: CanvasSampler) -> None:
        model, made = self.model(), self.made(sampler, trace_enabled=True, check=False)
        found = self.run(made, model)
        assert made.stats.target_forwards == model.calls == found.forwards > 0
        assert made.stats.new_tokens == 3 * LENGTH and made.stats.seconds > 0
        assert [trace.ids for trace in made.trace] == [found.new_ids(row) for row in range(3)]
        assert set(made.trace[0].columns) == set(made.trace_columns)
        again = copy.deepcopy(made)  # settings alone are copied
        assert again.stats.target_forwards == 0 and again == made

    def test_a_streamer_sees_drafts_and_the_end(self, sampler: CanvasSampler) -> None:
        seen: list[Any] = []

        class Streamer:
            def put_draft(self, value: torch.Tensor) -> None:
                seen.append(value.tolist())

            def put(self, value: torch.Tensor) -> None:
                seen.append(("put", value.tolist()))

            def end(self) -> None:
                seen.append("end")

        found = self.run(self.made(sampler), rows=1, streamer=Streamer())
        assert seen[0] == ("put", self.prompts(1)[0].tolist()) and seen[-1] == "end"
        assert seen[-2] == ("put", found.new_ids(0))
        with pytest.raises(BadInputError, match="one row"):
            self.run(self.made(sampler), streamer=Streamer())

    # -- what is refused, before any forward ---------------------------------------------------------------------------
    def test_bad_input(self, sampler: CanvasSampler) -> None:
        model = self.model()
        ids = self.prompts()
        with_mask = ids.clone()
        with_mask[0, 0] = MASK
        right = torch.ones_like(ids)
        right[0, -1] = 0
        some = torch.zeros_like(ids, dtype=torch.bool)
        whole, bare = self.made(sampler), self.made(sampler, gen_length=None)
        for made, given, more, message in (
            (whole, with_mask, {}, "mask token 10"),
            (bare, ids, {}, "how long"),
            (bare, ids, {"editable": some}, "no position to write"),
            (bare, ids, {"editable": some[:, :3]}, "editable must be"),
            (whole, ids, {"editable": ~some}, "gen_length"),
            (whole, ids, {"attention_mask": right}, "left"),
            (whole, ids, {"attention_mask": right[:, :2]}, "attention_mask must be"),
            (whole, ids, {"seeds": [1]}, "one a row"),
            (whole, ids, {"seeds": [1, 2, 3], "generator": torch.Generator()}, "both decide"),
            (whole, ids[:, :0], {}, "[Ee]mpty"),
            (whole, ids + 90, {}, "vocabulary"),
            (whole, ids.repeat(1, 20), {}, "112 positions|positions"),
            (whole, ids, {"pixel_values": ids}, "pixel_values"),
            (self.made(sampler, mask_id=99), ids, {}, "mask_id=99"),
        ):
            with pytest.raises(BadInputError, match=message):
                made(model, given, **more)
        model.config.mask_token_id = None
        with pytest.raises(BadInputError, match="no mask token"):
            whole(model, ids)
        assert model.calls == 0

    def test_a_causal_model_is_refused(self, sampler: CanvasSampler) -> None:
        model = tiny_llama(VOCAB)
        with pytest.raises(UnsupportedModelError, match="causal: with another last token only"):
            self.made(sampler, mask_id=MASK)(model, self.prompts())

    def test_a_model_that_reads_padding_is_refused(self, sampler: CanvasSampler) -> None:
        class Reads(TinyDenoiser):
            def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
                return super().forward(input_ids)

        mask = torch.ones(3, 5)
        mask[0, 0] = 0
        with pytest.raises(UnsupportedModelError, match="padded row"):
            self.made(sampler)(Reads(), self.prompts(), attention_mask=mask)
