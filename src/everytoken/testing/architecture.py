"""What every network of a method promises: it is a model of transformers, and shows what it decided.

Inherit the battery and name methods; each gives a tiny network (``Architecture.tiny``)::

    from everytoken.testing.architecture import ArchitectureConformance
    from mypackage import MyMethod

    class TestMyMethod(ArchitectureConformance):
        architectures = (MyMethod,)

A feature that a network declares as lacking is skipped with its reason. ``inputs`` of the method may be overridden for
networks that read something else than ids.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from ..architectures.base import Architecture, Inputs, is_architecture
from ..core.rng import seed_everything
from .models import tiny_tokenizer

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
SLOW = (
    "test_it_compiles_into_one_graph",
    "test_trainer_trains_it",
    "test_sft_trainer_trains_it",
    "test_peft_adapts_it",
)
"""Tests of a second and more; a project may mark them (``slow_marks``)."""
NEW = 6


def settings(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says, without what saving adds, in nested ones too."""
    adds = ("_name_or_path", "architectures", "dtype", "transformers_version")

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {k: kept(v) if isinstance(v, dict) else v for k, v in values.items() if k not in adds}

    return kept(config.to_dict())


class ArchitectureConformance:
    """The battery; see the module's docstring."""

    architectures: ClassVar[tuple[type[Architecture], ...]] = ()
    slow_marks: ClassVar[tuple[pytest.MarkDecorator, ...]] = ()
    """Marks of the tests in ``SLOW``: ``(pytest.mark.slow,)``."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "method" in metafunc.fixturenames:
            marks = self.slow_marks if metafunc.function.__name__ in SLOW else ()
            cases = [pytest.param(item, marks=marks, id=item.__name__) for item in self.architectures]
            metafunc.parametrize("method", cases)

    # -- helpers -------------------------------------------------------------------------------------------------------
    def network(self, method: type[Architecture]) -> PreTrainedModel:
        """A fresh tiny network, always the same."""
        seed_everything(0)
        return method.tiny().eval()

    def needs(self, method: type[Architecture], *features: str) -> None:
        """Skips where one of the features is declared as lacking."""
        for name in features:
            if name in method.declares.lacks:
                pytest.skip(f"{method.__name__} lacks {name}: {method.declares.lacks[name]}")

    def run(self, model: PreTrainedModel, inputs: Inputs) -> Any:
        """A forward without gradients, with torch's generator at the same place every time."""
        torch.manual_seed(0)
        with torch.no_grad():
            return model(**inputs)

    def padded(self, model: PreTrainedModel, inputs: Inputs, count: int, left: bool) -> Inputs:
        """Padding on one side of ids, mask and labels; an encoder-decoder's labels have their own length."""
        sides = (count, 0) if left else (0, count)
        padding = getattr(model.config.get_text_config(), "pad_token_id", None) or 0  # not every network reads ids
        fill = {"input_ids": padding, "attention_mask": 0}
        if not model.config.is_encoder_decoder:
            fill["labels"] = -100
        pad = torch.nn.functional.pad
        padded = {k: pad(v, sides, value=fill[k]) if k in fill else v for k, v in inputs.items()}
        if left and "labels" in fill and "labels" in padded:
            padded["labels"][:, count] = -100  # the last padding position would predict it
        return padded

    def gradients(self, model: PreTrainedModel, inputs: Inputs) -> tuple[float, dict[str, torch.Tensor | None]]:
        """Loss and gradients of a step in training mode."""
        model.train()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        loss = model(**inputs).loss
        loss.backward()
        return float(loss.detach()), {name: weight.grad for name, weight in model.named_parameters()}

    # -- what it is ----------------------------------------------------------------------------------------------------
    def test_it_says_what_it_is(self, method: type[Architecture]) -> None:
        assert is_architecture(method)
        declared, model = method.declares, self.network(method)
        assert type(model) is declared.model and declared.model.config_class is declared.config
        assert method.trace_columns == declared.columns
        parts = [type(part) for part in model.modules() if isinstance(part, PreTrainedModel)]
        custom = [part.__name__ for part in parts if part.is_custom_code()]
        assert not custom, f"{custom}: inherit everytoken.architectures.base.OwnWeights"
        assert sum(weight.numel() for weight in model.parameters()) < 500_000

    def test_auto_classes_load_what_it_saves(self, method: type[Architecture], tmp_path: Path) -> None:
        model, declared = self.network(method), method.declares
        inputs = method.inputs(model)
        model.save_pretrained(tmp_path)
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        assert type(config) is declared.config
        again = getattr(transformers, declared.auto).from_pretrained(tmp_path)
        assert type(again) is declared.model
        assert settings(model.config) == settings(again.config)
        assert torch.equal(self.run(model, inputs).logits, self.run(again.eval(), inputs).logits)
        before = {name: weight.data_ptr() for name, weight in again.state_dict().items()}
        assert before.keys() == model.state_dict().keys()

    # -- forward and backward ------------------------------------------------------------------------------------------
    def test_gradients_reach_every_weight(self, method: type[Architecture]) -> None:
        model = self.network(method)
        loss, found = self.gradients(model, method.inputs(model))
        assert math.isfinite(loss)
        lacking = [name for name, gradient in found.items() if gradient is None]
        assert not lacking, f"no gradient reaches {lacking}"
        assert all(bool(gradient.isfinite().all()) for gradient in found.values() if gradient is not None)

    def test_steps_lower_the_loss(self, method: type[Architecture]) -> None:
        model = self.network(method)
        inputs = method.inputs(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(12):
            losses.append(self.gradients(model, inputs)[0])
            optimizer.step()
        assert losses[-1] < losses[0]

    def test_rows_do_not_know_each_other(self, method: type[Architecture]) -> None:
        model = self.network(method)
        inputs = method.inputs(model, batch=3)
        together = self.run(model, inputs).logits
        for row in range(3):
            alone = self.run(model, {k: v[row : row + 1] for k, v in inputs.items()}).logits
            torch.testing.assert_close(together[row : row + 1], alone, **CLOSE)

    def test_a_token_does_not_see_the_future(self, method: type[Architecture]) -> None:
        if method.declares.auto != "AutoModelForCausalLM":
            pytest.skip("not a causal language model")
        model = self.network(method)
        inputs = method.inputs(model)
        other = {k: v.clone() for k, v in inputs.items()}
        other["input_ids"][:, -1] = inputs["input_ids"][:, -2]
        assert not torch.equal(other["input_ids"], inputs["input_ids"]), "choose other ids"
        before, after = self.run(model, inputs).logits, self.run(model, other).logits
        torch.testing.assert_close(before[:, :-1], after[:, :-1], **CLOSE)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_nothing(self, method: type[Architecture], side: str) -> None:
        self.needs(method, "padding")
        model = self.network(method)
        inputs = method.inputs(model)
        bare, padded = self.run(model, inputs), self.run(model, self.padded(model, inputs, 3, side == "left"))
        logits = padded.logits
        if not model.config.is_encoder_decoder:
            logits = logits[:, 3:] if side == "left" else logits[:, :-3]
        torch.testing.assert_close(logits, bare.logits, **CLOSE)
        torch.testing.assert_close(padded.loss, bare.loss, **CLOSE)

    def test_an_empty_row_is_refused_or_finite(self, method: type[Architecture]) -> None:
        self.needs(method, "padding")
        model = self.network(method)
        inputs = method.inputs(model)
        inputs["attention_mask"][0] = 0
        try:
            logits = self.run(model, inputs).logits
        except ValueError:
            return
        assert bool(logits.isfinite().all())

    def test_embeddings_take_the_place_of_ids(self, method: type[Architecture]) -> None:
        self.needs(method, "inputs_embeds")
        model = self.network(method)
        inputs = method.inputs(model)
        wanted = self.run(model, inputs).logits
        embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
        torch.testing.assert_close(self.run(model, inputs | {"inputs_embeds": embeds}).logits, wanted, **CLOSE)

    def test_sdpa_is_eager(self, method: type[Architecture]) -> None:
        self.needs(method, "sdpa")
        model = self.network(method)
        inputs = self.padded(model, method.inputs(model), 2, left=False)
        found = []
        for way in ("eager", "sdpa"):
            model.set_attn_implementation(way)
            found.append(self.run(model, inputs).loss)
        torch.testing.assert_close(*found, **CLOSE)

    def test_bfloat16(self, method: type[Architecture]) -> None:
        self.needs(method, "bf16")
        model = self.network(method)
        inputs = method.inputs(model)
        wanted = self.run(model, inputs).loss
        half = copy.deepcopy(model).bfloat16()
        loss, found = self.gradients(half, inputs)
        assert math.isfinite(loss) and abs(loss - float(wanted)) < 0.1 * abs(float(wanted)) + 0.1
        assert all(bool(gradient.isfinite().all()) for gradient in found.values() if gradient is not None)

    def test_checkpointing_changes_no_gradient(self, method: type[Architecture]) -> None:
        self.needs(method, "checkpointing")
        model = self.network(method)
        inputs = method.inputs(model)
        loss, wanted = self.gradients(model, inputs)
        model.gradient_checkpointing_enable()
        again, found = self.gradients(model, inputs)
        assert loss == pytest.approx(again, rel=1e-5)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, **CLOSE)

    # -- generation ----------------------------------------------------------------------------------------------------
    def written(self, model: PreTrainedModel, prompt: Inputs, **settings: Any) -> Any:
        torch.manual_seed(0)
        arguments = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, **settings}
        return model.generate(**prompt, return_dict_in_generate=True, output_scores=True, **arguments)

    def test_a_cache_changes_nothing(self, method: type[Architecture]) -> None:
        self.needs(method, "generate", "cache")
        model = self.network(method)
        prompt = method.inputs(model)
        del prompt["labels"]
        cached, fresh = (self.written(model, prompt, use_cache=use) for use in (True, False))
        assert torch.equal(cached.sequences, fresh.sequences)
        for ours, theirs in zip(cached.scores, fresh.scores, strict=True):
            there = theirs.isfinite()
            torch.testing.assert_close(ours[there], theirs[there], rtol=1e-3, atol=1e-4)

    def test_padded_prompts_write_the_same(self, method: type[Architecture]) -> None:
        self.needs(method, "generate", "padding")
        model = self.network(method)
        prompt = method.inputs(model)
        del prompt["labels"]
        bare, padded = self.written(model, prompt), self.written(model, self.padded(model, prompt, 3, left=True))
        assert torch.equal(bare.sequences[:, -NEW:], padded.sequences[:, -NEW:])

    # -- other libraries -----------------------------------------------------------------------------------------------
    def test_it_compiles_into_one_graph(self, method: type[Architecture]) -> None:
        self.needs(method, "compile")
        model = self.network(method)
        inputs = method.inputs(model)
        wanted = self.run(model, inputs)
        torch._dynamo.reset()
        compiled = self.run(torch.compile(model, backend="eager", fullgraph=True), inputs)  # type: ignore[arg-type]
        torch.testing.assert_close(compiled.logits, wanted.logits, **CLOSE)

    def test_trainer_trains_it(self, method: type[Architecture], tmp_path: Path) -> None:
        self.needs(method, "trainer")
        model = self.network(method)
        inputs = method.inputs(model, batch=4)
        rows = [{k: v[row] for k, v in inputs.items()} for row in range(4)]
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1, per_device_eval_batch_size=2,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert any(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
        assert math.isfinite(trainer.evaluate()["eval_loss"])

    def test_sft_trainer_trains_it(self, method: type[Architecture], tmp_path: Path) -> None:
        self.needs(method, "sft")
        pytest.importorskip("trl")
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        model = self.network(method)
        inputs = method.inputs(model, batch=4)
        rows = Dataset.from_list([{"input_ids": row.tolist()} for row in inputs["input_ids"]])
        arguments = SFTConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", disable_tqdm=True, max_length=16,
        )  # fmt: skip
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tiny_tokenizer())
        assert math.isfinite(trainer.train().training_loss)

    def test_peft_adapts_it(self, method: type[Architecture]) -> None:
        self.needs(method, "peft")
        peft = pytest.importorskip("peft")
        model = self.network(method)
        inputs = method.inputs(model)
        wanted = self.run(model, inputs).logits
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
        torch.testing.assert_close(self.run(adapted.eval(), inputs).logits, wanted, **CLOSE)  # its B is zero
        _, found = self.gradients(adapted, inputs)
        learned = {name for name, gradient in found.items() if gradient is not None}
        assert learned and all("lora_" in name for name in learned)

    # -- what it decided -----------------------------------------------------------------------------------------------
    def test_it_shows_every_decision(self, method: type[Architecture]) -> None:
        model = self.network(method)
        torch.manual_seed(0)
        with torch.no_grad():
            seen = method().observe(model, method.tiny_tokenizer(), method.example)
        assert seen.traces and all(math.isfinite(value) for value in seen.figures.values())
        for trace in seen.traces:
            assert len(trace) > 0 and tuple(trace.columns) == method.trace_columns
            assert any(value is not None for value in trace.columns[method.trace_columns[0]])

    def test_its_variants_are_its_own(self, method: type[Architecture]) -> None:
        for name, arm in method().arms().items():
            assert isinstance(arm, method), f"{name} is another method"
