"""What every decoder promises: ``generate``'s settings are honoured or refused by name, and nothing is left behind on
the model.

Inherit the battery and name decoders; each says in ``Decoder.examples`` how it is built for a tiny model::

    from everytoken.testing.decoder import DecoderConformance
    from mypackage import MyDecoder

    class TestMyDecoder(DecoderConformance):
        decoders = (MyDecoder,)

Tests are pytest tests, one for each example. ``model``, ``tokenizer`` and ``prompt`` may be overridden for decoders
that need another model than a random Llama.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import BadInputError
from ..decoding.base import Decoder, Example
from ..decoding.loop import LoopDecoder, MatcherLogitsProcessor
from .distributions import Recorder, check_distribution, counters, exact_distribution
from .matcher import ToyMatcher
from .models import tiny_llama, tiny_llava, tiny_tokenizer

VOCAB = 13
NEW = 12
GREEDY_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"max_new_tokens": 1},
    {"max_new_tokens": None, "max_length": 15},
    {"min_new_tokens": 5},
    {"suppress_tokens": [1, 2]},
)


@dataclass(frozen=True)
class Case:
    """One example of one decoder, by name."""

    decoder: type[Decoder]
    example: str

    def on(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Example:
        """The example for a model."""
        return self.decoder.examples(model, tokenizer)[self.example]

    def __str__(self) -> str:
        return f"{self.decoder.__name__}, {self.example}"


class DecoderConformance:
    """The battery; see the module's docstring."""

    decoders: ClassVar[tuple[type[Decoder], ...]] = ()
    draws: ClassVar[int] = 400
    """Samples that the chi-square test of each decoder draws."""
    further_marks: ClassVar[tuple[pytest.MarkDecorator, ...]] = ()
    """Marks of all but a decoder's first example, where a project runs those less often: ``(pytest.mark.slow,)``."""
    _found: ClassVar[list[Case]]

    # -- what is tested ------------------------------------------------------------------------------------------------
    def model(self, vocab: int = VOCAB, scale: float = 1.0) -> PreTrainedModel:
        """A random model whose token 0 ends a text (and is rare); ``scale`` sharpens its distributions."""
        model = tiny_llama(vocab, seed=1, layers=4, scale=scale, eos=0)
        with torch.no_grad():
            model.lm_head.weight[0] = 0
        return model

    def tokenizer(self, vocab: int = VOCAB) -> PreTrainedTokenizerBase:
        """A tokenizer for it: token 0 ends a text, token 1 pads."""
        return tiny_tokenizer("abcdefghijk"[: vocab - 2])

    def prompt(self) -> torch.Tensor:
        """``[1, T]``, of tokens that are neither end nor padding."""
        return torch.tensor([[3, 5, 8, 2, 7, 7, 4]])

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            seen: set[type[Decoder]] = set()
            cases = []
            for case in type(self)._cases():
                marks = self.further_marks if case.decoder in seen else ()
                cases.append(pytest.param(case, marks=marks, id=str(case)))
                seen.add(case.decoder)
            metafunc.parametrize("case", cases)

    @classmethod
    def _cases(cls) -> list[Case]:
        """All examples of all decoders; asked once a class, for they are made with a model."""
        if "_found" not in vars(cls):
            battery = cls()
            model, tokenizer = battery.model(), battery.tokenizer()
            cls._found = [Case(item, name) for item in cls.decoders for name in item.examples(model, tokenizer)]
        return cls._found

    def example(self, case: Case, model: PreTrainedModel) -> Example:
        return case.on(model, self.tokenizer(model.config.vocab_size))

    def run(
        self,
        model: PreTrainedModel,
        decoder: Decoder | None,
        prompt: torch.Tensor | None = None,
        streamer: Recorder | None = None,
        likeliest: bool = False,
        **arguments: Any,
    ) -> Any:
        """``generate``, greedily unless told otherwise.

        Args:
            likeliest: sample from the likeliest token alone, as decoders that only sample are asked to.
        """
        prompt = self.prompt() if prompt is None else prompt
        defaults: dict[str, Any] = {
            "do_sample": False, "max_new_tokens": NEW, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0,
        }  # fmt: skip
        if likeliest or (decoder is not None and decoder.samples_only and not arguments.get("do_sample")):
            defaults |= {"do_sample": True, "top_k": 1}
        if decoder is None:
            return model.generate(prompt, **defaults | arguments)
        return decoder.generate(model, prompt, streamer=streamer, **defaults | arguments)

    def new(self, output: torch.Tensor, length: int | None = None) -> list[list[int]]:
        """Each row's tokens behind a prompt of ``length`` tokens, up to and with the end token 0."""
        rows = output[:, self.prompt().shape[1] if length is None else length :].tolist()
        return [row[: row.index(0) + 1] if 0 in row else row for row in rows]

    def refused(self, model: PreTrainedModel, what: str, action: Callable[[], Any]) -> None:
        """Asserts that ``action`` is refused by name before any forward."""
        called: list[int] = []
        hook = model.register_forward_pre_hook(lambda *_: called.append(1))
        try:
            with pytest.raises(BadInputError):
                action()
        finally:
            hook.remove()
        assert not called, f"{what} was refused after a forward."

    # -- the text ------------------------------------------------------------------------------------------------------
    def test_call_is_final(self, case: Case) -> None:
        assert case.decoder.__call__ is Decoder.__call__

    @pytest.mark.parametrize("settings", GREEDY_SETTINGS, ids=str)
    def test_greedy_text_is_that_of_generate(self, case: Case, settings: dict[str, Any]) -> None:
        model = self.model()
        example = self.example(case, model)
        decoder = example.make()
        if example.refuses & settings.keys():
            self.refused(model, str(settings), lambda: self.run(model, decoder, **settings))
        elif example.exact:
            expected = self.run(model, None, likeliest=decoder.samples_only, **settings)
            assert self.run(model, decoder, **settings).tolist() == expected.tolist()
        else:
            assert self.run(model, decoder, **settings).shape[1] > self.prompt().shape[1]

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 3}], ids=str)
    def test_samples_follow_the_models_distribution(self, case: Case, sampling: dict[str, Any]) -> None:
        model = self.model(vocab=5, scale=0.4)
        example = self.example(case, model)
        if not example.exact:
            return  # another distribution: the decoder's own tests know which
        torch.manual_seed(1234)
        prompt, draws = [2, 3], self.draws
        arguments = {"do_sample": True, "max_new_tokens": 2, "top_k": 0, "top_p": 1.0} | sampling
        output = self.run(model, example.make(), torch.tensor([prompt] * draws), **arguments)
        counts: dict[tuple[int, ...], int] = {}
        for row in output[:, len(prompt) :].tolist():
            counts[tuple(row)] = counts.get(tuple(row), 0) + 1
        check_distribution(counts, exact_distribution(model, prompt, 2, **sampling))

    @pytest.mark.parametrize("sampling", [{"top_p": 0.5}, {"min_p": 0.4}, {"top_k": 1}], ids=str)
    def test_warpers_restrict_what_is_sampled(self, case: Case, sampling: dict[str, Any]) -> None:
        """With all mass but the likeliest token's cut away, sampling is greedy decoding."""
        model = self.model(scale=64)  # one token has nearly all the mass
        example = self.example(case, model)
        torch.manual_seed(0)
        sampled = self.run(model, example.make(), do_sample=True, **{"top_k": 0} | sampling)
        assert sampled.tolist() == self.run(model, example.make()).tolist()

    def test_an_end_token_ends_the_text_wherever_it_comes(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        (text,) = self.new(self.run(model, example.make()))
        last = int(self.prompt()[0, -1])
        for place, token in enumerate(text):
            if token in text[:place] or token == last or not example.prefix_stable:
                continue
            (got,) = self.new(self.run(model, example.make(), eos_token_id=[token, VOCAB + 5]))
            assert got == text[: place + 1]
        for token in range(VOCAB):
            if token == last:
                continue
            (got,) = self.new(self.run(model, example.make(), eos_token_id=token))
            ends = [place for place, item in enumerate(got) if item == token]
            assert not ends or set(got[ends[0] :]) <= {token, 0}

    def test_stop_strings(self, case: Case) -> None:
        model, tokenizer = self.model(), self.tokenizer()
        example = self.example(case, model)
        text = tokenizer.decode(self.new(self.run(model, example.make()))[0])
        stop = text[4:6]
        output = self.run(model, example.make(), stop_strings=stop, tokenizer=tokenizer)
        got = tokenizer.decode(self.new(output)[0])
        if example.prefix_stable:
            assert got == text[: text.index(stop) + 2]
        else:
            assert stop not in got[:-2].rstrip("\n")

    def test_ragged_batches_give_what_single_rows_give(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        prompts = [[3, 5, 8, 2, 7, 7, 4], [4, 4], [9, 3, 6, 2]]
        single = [self.new(self.run(model, example.make(), torch.tensor([p])), len(p))[0] for p in prompts]
        ids = torch.tensor([[0] * (7 - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (7 - len(p)) + [1] * len(p) for p in prompts])
        together = self.new(self.run(model, example.make(), ids, attention_mask=mask))
        assert len(together) == 3
        if example.padding_exact:
            assert together == single

    def test_several_samples_of_one_prompt_and_the_seed(self, case: Case) -> None:
        model = self.model(scale=0.2)
        example = self.example(case, model)
        arguments: dict[str, Any] = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
        if "num_return_sequences" in example.refuses:
            self.refused(model, "num_return_sequences", lambda: self.run(model, example.make(), **arguments))
            return
        samples = []
        for _ in range(2):
            torch.manual_seed(5)
            samples.append(self.run(model, example.make(), **arguments).tolist())
        assert samples[0] == samples[1]
        assert len({tuple(row) for row in samples[0]}) > 1
        assert len(samples[0]) == 3

    # -- what is returned ----------------------------------------------------------------------------------------------
    def test_a_dict_holds_what_was_asked_for(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        arguments: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        if example.refuses & arguments.keys():
            self.refused(model, "output_scores", lambda: self.run(model, example.make(), **arguments))
            return
        decoder = example.make()
        actual = self.run(model, decoder, **arguments)
        assert actual.stats is decoder.stats
        assert actual.stats.new_tokens > 0
        for kind in ("scores", "logits"):
            assert len(actual[kind]) >= actual.sequences.shape[1] - self.prompt().shape[1]
        if example.exact:
            expected = self.run(model, None, likeliest=decoder.samples_only, **arguments)
            shift = len(actual.scores) - len(expected.scores)  # steps that wrote the prompt's end anew
            for kind in ("scores", "logits"):
                for ours, theirs in zip(actual[kind][shift:], expected[kind], strict=True):
                    assert torch.allclose(ours, theirs, atol=1e-4)

    def test_a_cache_is_continued_or_refused(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        whole = self.run(model, example.make())
        first = self.run(model, example.make(), max_new_tokens=5, return_dict_in_generate=True)
        cache = first.past_key_values
        if "past_key_values" in example.refuses or not case.decoder.continues:
            if cache is None:
                cache = DynamicCache()
                model(self.prompt()[:, :3], past_key_values=cache, use_cache=True)
            self.refused(model, "past_key_values", lambda: self.run(model, example.make(), past_key_values=cache))
            return
        assert 0 < cache.get_seq_length() < first.sequences.shape[1]
        second = self.run(model, example.make(), first.sequences, max_new_tokens=NEW - 5, past_key_values=cache)
        assert second.shape == whole.shape
        if example.prefix_stable:
            assert second.tolist() == whole.tolist()

    def test_a_streamer_sees_every_token_once_or_is_refused(self, case: Case) -> None:
        model, recorder = self.model(), Recorder()
        decoder = self.example(case, model).make()
        if not decoder.streams:
            self.refused(model, "streamer", lambda: self.run(model, decoder, streamer=recorder))
            assert not recorder.tokens
            return
        output = self.run(model, decoder, streamer=recorder)
        assert recorder.tokens == output[0].tolist()
        assert recorder.ended == 1

    def test_traces_have_a_value_for_every_token(self, case: Case) -> None:
        model = self.model()
        decoder = self.example(case, model).make(trace_enabled=True)
        prompts = torch.tensor([[3, 5, 8], [9, 9, 2]])
        output = self.run(model, decoder, prompts)
        assert len(decoder.trace) == 2
        for trace, row in zip(decoder.trace, output.tolist(), strict=True):
            assert trace.ids
            assert "".join(map(chr, trace.ids)) in "".join(map(chr, row))
            assert decoder.colour in trace.columns
            assert set(trace.columns) <= set(decoder.trace_columns)
        assert decoder.stats.new_tokens == sum(map(len, self.new(output, 3)))
        assert decoder.stats.target_forwards > 0
        assert decoder.stats.seconds > 0
        assert all(isinstance(value, float) for value in decoder.figures().values())
        plain = self.example(case, model).make()
        self.run(model, plain, prompts)
        assert plain.trace == []

    # -- matchers ------------------------------------------------------------------------------------------------------
    def takes_matcher(self, case: Case, example: Example) -> bool:
        named = any(item.name == "matcher" and item.init for item in dataclasses.fields(case.decoder))
        if named and "matcher" in example.refuses:
            with pytest.raises(BadInputError, match="matcher"):
                example.make(matcher=ToyMatcher(VOCAB))
            return False
        return named

    def test_a_matcher_is_obeyed(self, case: Case) -> None:
        model, matcher = self.model(), ToyMatcher(VOCAB)
        example = self.example(case, model)
        if not self.takes_matcher(case, example):
            return
        got = self.run(model, example.make(matcher=matcher))
        assert [token % 2 for token in self.new(got)[0]] == [0, 1] * (NEW // 2)
        assert matcher.text == []
        if example.exact:
            processor = MatcherLogitsProcessor(matcher, self.prompt().shape[1])
            assert got.tolist() == self.run(model, None, logits_processor=[processor]).tolist()

    def test_a_finished_matcher_ends_every_row(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        if not self.takes_matcher(case, example):
            return
        decoder = example.make(matcher=ToyMatcher(VOCAB, length=4, end=12))
        output = self.run(model, decoder, torch.tensor([[3, 5, 8], [9, 9, 2]]), eos_token_id=12)
        for row in output[:, 3:].tolist():
            assert [token % 2 for token in row[:4]] == [0, 1, 0, 1]
            assert row[4] == 12

    # -- what is refused -----------------------------------------------------------------------------------------------
    @pytest.mark.parametrize(
        "arguments",
        [{"use_cache": False}, {"penalty_alpha": 0.5, "top_k": 4}, {"prompt_lookup_num_tokens": 2}],
        ids=str,
    )
    def test_modes_are_refused_before_any_forward(self, case: Case, arguments: dict[str, Any]) -> None:
        model = self.model()
        decoder = self.example(case, model).make()
        config = GenerationConfig(**{"do_sample": decoder.samples_only, "max_new_tokens": 4} | arguments)
        if decoder.samples_only and "penalty_alpha" in arguments:
            config.do_sample = False
        self.refused(model, str(arguments), lambda: decoder(model, self.prompt(), generation_config=config))

    def test_an_empty_prompt_is_refused(self, case: Case) -> None:
        model = self.model()
        decoder = self.example(case, model).make()
        with pytest.raises(BadInputError, match="empty"):
            decoder(model, self.prompt()[:, :0], generation_config=model.generation_config)

    def test_further_inputs_reach_the_model_or_are_refused(self, case: Case) -> None:
        model = self.model()
        decoder = self.example(case, model).make()
        seen: list[bool] = []
        original = model.forward

        @functools.wraps(original)
        def forward(*args: Any, token_type_ids: torch.Tensor | None = None, **kwargs: Any) -> Any:
            seen.append(token_type_ids is not None)
            return original(*args, **kwargs)

        extra = inspect.Parameter("token_type_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
        *known, rest = inspect.signature(original).parameters.values()
        forward.__signature__ = inspect.Signature([*known, extra, rest])  # type: ignore[attr-defined]
        model.forward = forward
        types = torch.zeros_like(self.prompt())
        if decoder.carries is None or "token_type_ids" in decoder.carries:
            self.run(model, decoder, token_type_ids=types)
            assert seen
            assert all(seen)
        else:
            with pytest.raises(BadInputError, match="token_type_ids"):
                self.run(model, decoder, token_type_ids=types)
            assert not seen

    def test_images_reach_the_model_or_are_refused(self, case: Case) -> None:
        """Also embeddings beside the tokens: neither is dropped."""
        reader, image = tiny_llava(VOCAB, seed=1, layers=4, eos=0), VOCAB - 1
        example = self.example(case, self.model())
        prompt = torch.tensor([[3, image, image, image, image, 5, 6]])
        pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        decoder = example.make()
        if decoder.carries is None or "pixel_values" in decoder.carries:
            seen: list[torch.Tensor] = []
            reader.model.vision_tower.register_forward_pre_hook(
                lambda _module, args, kwargs: seen.append(kwargs.get("pixel_values", args[0] if args else None)),
                with_kwargs=True,
            )
            output = self.run(reader, decoder, prompt, pixel_values=pixels)
            assert seen
            assert all(torch.equal(item[:1], pixels) for item in seen)
            if example.exact:
                plain = self.run(reader, None, prompt, likeliest=decoder.samples_only, pixel_values=pixels)
                assert output.tolist() == plain.tolist()
        else:
            self.refused(reader, "pixel_values", lambda: self.run(reader, decoder, prompt, pixel_values=pixels))
        if decoder.carries is None and isinstance(decoder, LoopDecoder):
            return  # transformers' own loop reads them
        model = self.model()
        embeds = model.get_input_embeddings()(self.prompt()).detach()
        self.refused(model, "inputs_embeds", lambda: self.run(model, example.make(), inputs_embeds=embeds))

    @pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
    def test_virtual_tokens_reach_the_model_or_are_refused(self, case: Case, kind: str) -> None:
        """What PEFT's prompt learning puts before the text."""
        peft = pytest.importorskip("peft")
        model = self.model()
        example = self.example(case, model)
        config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, config).eval()
        ids = {"input_ids": self.prompt(), "attention_mask": torch.ones_like(self.prompt())}
        arguments: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 0, "do_sample": False}
        decoder = example.make()
        if decoder.samples_only:
            arguments |= {"do_sample": True, "top_k": 1}
        try:
            got = tuned.generate(**ids, **arguments, custom_generate=decoder)
        except BadInputError as error:
            assert "PEFT's p" in str(error)
            return
        if example.exact:
            assert got.tolist() == tuned.generate(**ids, **arguments).tolist()
        else:
            assert decoder.carries is None

    # -- what is left behind -------------------------------------------------------------------------------------------
    def test_cancelling_leaves_the_model_as_it_was(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        before = self.run(model, None).tolist()
        hooks = [len(item._forward_hooks) + len(item._forward_pre_hooks) for item in model.modules()]
        keys = [set(item.__dict__) for item in model.modules()]

        def stop(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            if input_ids.shape[1] >= self.prompt().shape[1] + 3:
                raise KeyboardInterrupt
            return torch.zeros(len(input_ids), dtype=torch.bool)

        decoder = example.make()
        with pytest.raises(KeyboardInterrupt):
            self.run(model, decoder, stopping_criteria=[stop])
        assert [len(item._forward_hooks) + len(item._forward_pre_hooks) for item in model.modules()] == hooks
        assert [set(item.__dict__) for item in model.modules()] == keys
        assert self.run(model, None).tolist() == before
        assert self.run(model, decoder).tolist() == self.run(model, example.make()).tolist()

    def test_inside_inference_mode_and_out_again(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        with torch.inference_mode():
            inside = self.run(model, example.make())
        assert inside.tolist() == self.run(model, example.make()).tolist()
        model(self.prompt(), labels=self.prompt()).loss.backward()
        assert next(model.parameters()).grad is not None

    def test_a_copy_has_the_settings_and_not_the_last_call(self, case: Case) -> None:
        model = self.model()
        decoder = self.example(case, model).make()
        self.run(model, decoder, max_new_tokens=2)
        other = copy.copy(decoder)
        assert other.stats.new_tokens == 0
        assert decoder.stats.new_tokens == 2
        for item in dataclasses.fields(decoder):
            assert getattr(other, item.name) is getattr(decoder, item.name)

    def test_two_threads_share_a_decoder(self, case: Case) -> None:
        model = self.model()
        example = self.example(case, model)
        prompts = [self.prompt(), torch.tensor([[9, 3, 6]])]
        lengths = [NEW, NEW - 4]
        alone = []
        for prompt, length in zip(prompts, lengths, strict=True):
            decoder = example.make()
            output = self.run(model, decoder, prompt, max_new_tokens=length)
            alone.append((output.tolist(), counters(decoder.stats)))
        shared, together = example.make(), threading.Barrier(2)
        got: dict[int, list[Any]] = {0: [], 1: []}
        failures: list[BaseException] = []

        def work(index: int) -> None:
            try:
                for _ in range(3):
                    together.wait(timeout=60)
                    output = self.run(model, shared, prompts[index], max_new_tokens=lengths[index])
                    got[index].append((output.tolist(), counters(shared.stats)))
            except BaseException as error:
                failures.append(error)
                together.abort()

        threads = [threading.Thread(target=work, args=(index,)) for index in got]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert got == {index: [alone[index]] * 3 for index in got}
        assert shared.stats.new_tokens == 0  # this thread has made no call
