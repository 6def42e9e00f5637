"""The battery of networks over every card of the station, and over one network written outside of the house."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from everytoken.architectures.base import Architecture, Network, Observation, OwnWeights, is_architecture, register
from everytoken.catalog import load_catalog
from everytoken.core.errors import BadInputError
from everytoken.core.trace import TokenTrace
from everytoken.testing.architecture import ArchitectureConformance
from everytoken.testing.models import tiny_llama


def architectures():
    cards = (card for card in load_catalog().values() if card.station == "architectures" and card.implementation)
    return tuple(found for found in (card.load() for card in cards) if is_architecture(found))


class TestEveryCard(ArchitectureConformance):
    architectures = architectures()
    slow_marks = (pytest.mark.rotating,)


class OutsideConfig(LlamaConfig):
    model_type = "outside_llama"


class OutsideForCausalLM(OwnWeights, LlamaForCausalLM):
    config_class = OutsideConfig


register(OutsideConfig, OutsideForCausalLM, "AutoModelForCausalLM")


@dataclass
class Outside(Architecture):
    """A Llama that decides nothing, as a method of another package would be written."""

    declares = Network(OutsideConfig, OutsideForCausalLM, columns=("logp",))

    @classmethod
    def tiny(cls):
        return OutsideForCausalLM(OutsideConfig(**tiny_llama(vocab=16).config.to_dict()))

    def observe(self, model, tokenizer, text, new_tokens=0):
        ids = torch.tensor([[3 + ord(letter) % 13 for letter in text]])
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        trace = TokenTrace(ids[0].tolist(), {"logp": [None, *logps.tolist()]}, list(text))
        return Observation([trace], {"nats a token": -float(logps.mean())})


class TestAnOutsideNetwork(ArchitectureConformance):
    architectures = (Outside,)
    slow_marks = (pytest.mark.slow,)


# -- the battery finds faults -----------------------------------------------------------------------------------------
def broken(change):
    """The outside network with another forward."""

    class Broken(OutsideForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            return change(self, super().forward, input_ids, kwargs)

    @dataclass
    class BrokenMethod(Outside):
        declares = Network(OutsideConfig, Broken, columns=("logp",))

        @classmethod
        def tiny(cls):
            torch.manual_seed(0)
            return Broken(OutsideConfig(**tiny_llama(vocab=16).config.to_dict()))

    return BrokenMethod


def blind_to_masks(self, forward, ids, kwargs):
    return forward(ids, **kwargs | {"attention_mask": None})


def sees_the_future(self, forward, ids, kwargs):
    output = forward(ids, **kwargs)
    output.logits = output.logits + output.logits[:, -1:]
    return output


def knows_its_neighbours(self, forward, ids, kwargs):
    output = forward(ids, **kwargs)
    output.logits = output.logits - output.logits.mean(0, keepdim=True)
    return output


def leaves_weights_out(self, forward, ids, kwargs):
    self.lm_head.weight.requires_grad_()
    output = forward(ids, **kwargs)
    output.loss = (output.logits.detach() @ torch.zeros(16)).sum() + self.model.norm.weight.sum()
    return output


def forgets_embeddings(self, forward, ids, kwargs):
    if (embeds := kwargs.get("inputs_embeds")) is not None:
        kwargs["inputs_embeds"] = embeds * 0
    return forward(ids, **kwargs)


def is_off_with_a_cache(self, forward, ids, kwargs):
    output = forward(ids, **kwargs)
    cache = kwargs.get("past_key_values")
    if cache is not None and ids.shape[1] == 1:
        output.logits = output.logits.flip(-1)
    return output


@pytest.mark.parametrize(
    ("law", "change", "further"),
    [
        ("test_padding_changes_nothing", blind_to_masks, ("left",)),
        ("test_a_token_does_not_see_the_future", sees_the_future, ()),
        ("test_rows_do_not_know_each_other", knows_its_neighbours, ()),
        ("test_gradients_reach_every_weight", leaves_weights_out, ()),
        ("test_embeddings_take_the_place_of_ids", forgets_embeddings, ()),
        ("test_a_cache_changes_nothing", is_off_with_a_cache, ()),
    ],
)
def test_it_finds_a_network_that(law, change, further):
    with pytest.raises(AssertionError):
        getattr(ArchitectureConformance(), law)(broken(change), *further)


def test_a_trace_without_a_declared_column_is_found():
    @dataclass
    class Silent(Outside):
        declares = Network(OutsideConfig, OutsideForCausalLM, columns=("logp", "route"))

    with pytest.raises(AssertionError):
        ArchitectureConformance().test_it_shows_every_decision(Silent)


def test_what_is_lacking_has_a_known_name_and_a_reason():
    for lacks in ({"kache": "why"}, {"cache": ""}):
        with pytest.raises(BadInputError, match="Features"):
            Network(OutsideConfig, OutsideForCausalLM, ("logp",), lacks=lacks)
    with pytest.raises(BadInputError, match="no trace column"):
        Network(OutsideConfig, OutsideForCausalLM, ())
