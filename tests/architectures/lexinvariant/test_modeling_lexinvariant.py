"""A lexinvariant model: equivariance, invariance over draws, partial variants, the oracle, what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from everytoken.architectures.lexinvariant.configuration_lexinvariant import LexinvariantConfig
from everytoken.architectures.lexinvariant.method import Lexinvariant, letter_rows, letters
from everytoken.architectures.lexinvariant.modeling_lexinvariant import LexinvariantForCausalLM
from everytoken.architectures.lexinvariant.symbols import bayes_mixture, cipher
from everytoken.core.errors import BadInputError

DECODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def network(seed=0, **settings):
    torch.manual_seed(seed)
    return LexinvariantForCausalLM(
        LexinvariantConfig(**{"decoder_config": DECODER, "vocab_size": 11} | settings)
    ).eval()


def text(rows=2, length=20, seed=0, symbols=11):
    return torch.randint(0, symbols, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_renaming_the_symbols_with_their_vectors_renames_the_logits():
    model, ids = network(), text()
    key = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    table = model.table(torch.tensor([1, 2]))
    renamed = torch.empty_like(table)
    renamed[:, key] = table
    before = model(ids, symbol_table=table).logits
    after = model(cipher(ids, key), symbol_table=renamed).logits
    torch.testing.assert_close(after[..., key], before, rtol=0, atol=1e-5)


@torch.no_grad()
def test_over_draws_a_text_and_its_cipher_cost_the_same():
    model, draws = network(), 64
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, 0.3)
    ids = text(1).expand(draws, -1)
    renamed = cipher(ids, torch.randperm(11, generator=torch.Generator().manual_seed(4)))

    def costs(rows, first):
        logits = model(rows, table_seeds=torch.arange(draws) + first).logits[:, :-1].log_softmax(-1)
        return -logits.gather(-1, rows[:, 1:, None])[..., 0].mean(1)

    one, other = costs(ids, 0), costs(renamed, 1000)
    spread = math.sqrt(float(one.var() + other.var()) / draws)
    assert abs(float(one.mean() - other.mean())) < 3 * spread


@torch.no_grad()
def test_every_row_draws_anew_and_a_seed_draws_the_same():
    model, ids = network(), text(1).expand(2, -1)
    logits = model(ids, table_seeds=torch.tensor([4, 5])).logits
    assert not torch.allclose(logits[0], logits[1])
    assert torch.equal(logits, model(ids, table_seeds=torch.tensor([4, 5])).logits)
    assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_no_weight_depends_on_the_alphabet(tmp_path):
    small, large = network(vocab_size=11), network(vocab_size=500)
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in large.state_dict().items()}
    assert not any("embed" in name for name in small.state_dict())
    small.save_pretrained(tmp_path)
    again = LexinvariantForCausalLM.from_pretrained(tmp_path, vocab_size=500)
    assert again(text(symbols=500), table_seeds=torch.tensor([1, 2])).logits.shape == (2, 20, 500)


@torch.no_grad()
def test_without_random_vectors_it_is_an_ordinary_tied_model():
    model, ids = network(random_share=0.0), text()
    embedded = model.learned.weight[ids] * math.sqrt(16)
    hidden = model.decoder(inputs_embeds=embedded).last_hidden_state
    wanted = hidden @ model.learned.weight.T * model.scale
    torch.testing.assert_close(model(ids).logits, wanted)
    model.train()
    torch.testing.assert_close(model(ids).logits, wanted)


def test_a_share_of_sequences_or_of_symbols_is_random_in_training():
    for kind in ("sequences", "symbols"):
        model = network(random_share=0.5, random_kind=kind, learned_symbols=2)
        model.train()
        table = model.table(torch.arange(200))
        learned = (table == model.learned.weight).all(-1)
        assert learned[:, :2].all()
        rest = learned[:, 2:].float()
        assert float(rest.mean()) == pytest.approx(0.5, abs=0.1)
        assert bool((rest.mean(1) % 1 == 0).all()) == (kind == "sequences")
        model.eval()
        assert bool((model.table(torch.arange(3)) == model.learned.weight).all())


def test_symbols_with_learned_vectors_keep_them():
    model = network(learned_symbols=3)
    table = model.table(torch.tensor([1, 2]))
    assert torch.equal(table[0, :3], table[1, :3])
    assert not torch.equal(table[0, 3:], table[1, 3:])
    assert model.learned.weight.shape == (3, 16)


@torch.no_grad()
def test_generation_keeps_one_table_and_beams_share_it():
    model, ids = network(), text(2, 6)
    seeds = torch.tensor([8, 9])
    arguments = {"max_new_tokens": 5, "do_sample": False, "table_seeds": seeds}
    both = model.generate(ids, **arguments)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], **arguments | {"table_seeds": seeds[row : row + 1]})
        assert torch.equal(alone[0], both[row])
    cached, fresh = (model.generate(ids, num_beams=3, use_cache=use, **arguments) for use in (True, False))
    assert torch.equal(cached, fresh)


@pytest.mark.slow
def test_with_its_table_given_it_compiles_into_one_graph():
    model, ids = network(), text()
    table = model.table(torch.tensor([1, 2]))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, symbol_table=table).logits, model(ids, symbol_table=table).logits)


@pytest.mark.slow
def test_trained_on_renamed_samples_it_nears_the_oracle():
    """Two layers of 32 learn the mixture: the divergence falls, and the loss is never below the oracle's."""
    probabilities = torch.tensor([0.7, 0.2, 0.1])
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = network(vocab_size=3, decoder_config=decoder)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)

    def batch(rows):
        ids = torch.multinomial(probabilities, rows * 16, replacement=True, generator=generator).reshape(rows, 16)
        keys = torch.rand(rows, 3, generator=generator).argsort(1)
        return keys.gather(1, ids)

    held = batch(64)
    oracle = torch.stack([
        torch.stack([bayes_mixture(probabilities, row[:end])[1] for end in range(1, 16)]) for row in held
    ])  # fmt: skip
    found = []
    for step in range(240):
        optimizer.zero_grad()
        rows = batch(128)
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        if step in (39, 239):
            with torch.no_grad():
                ours = model(held, table_seeds=torch.arange(64)).logits[:, :-1].log_softmax(-1)
            found.append(float((oracle * (oracle.log() - ours)).sum(-1).mean()))
    assert 0 < found[1] < 0.75 * found[0]
    assert found[1] < 0.2


def test_letters_of_a_text():
    assert "".join(chr(97 + i) if i < 26 else " " for i in letters(b"An  OLD, bridge!")) == "an old bridge "
    rows = letter_rows(torch.tensor([list(b"a  b....c")]), 6)
    assert rows.tolist() == [[0, 26, 1, 26, 2, 26]]


def test_bad_input_is_refused():
    model, ids = network(), text()
    with pytest.raises(BadInputError, match="not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, 16))
    with pytest.raises(BadInputError, match="this alphabet has 11"):
        model(ids + 1)
    with pytest.raises(BadInputError, match="one a row"):
        model(ids, table_seeds=torch.tensor([1]))
    with pytest.raises(BadInputError, match="symbol_table must be"):
        model(ids, symbol_table=torch.zeros(2, 11, 8))
    with pytest.raises(BadInputError, match="under one table"):
        model(ids, past_key_values=model(ids, use_cache=True).past_key_values)
    with pytest.raises(BadInputError, match="fewer rows"):
        network(largest_table=300)(ids)
    for settings in (
        {"random_share": 1.5},
        {"random_kind": "letters"},
        {"vocab_size": 1},
        {"learned_symbols": 11},
        {"orthogonal": True, "vocab_size": 17},
    ):
        with pytest.raises(BadInputError):
            network(**settings)
    with pytest.raises(BadInputError, match="no letters"):
        Lexinvariant().observe(network(vocab_size=27), None, "!")
