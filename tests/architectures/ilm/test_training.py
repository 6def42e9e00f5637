"""``everytoken train ilm`` and what it learns from, the trial, and star graphs."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import transformers

from everytoken.architectures.ilm.method import ILM
from everytoken.architectures.ilm.training import TRAINING, InsertionTraining, loss_of, source_of
from everytoken.architectures.trial import trial
from everytoken.core.errors import BadInputError
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.training.base import TrainingContext, read_config
from everytoken.training.datasets import star_graphs as stars

SMALL = ["steps=4", "batch=4", "layers=1", "width=16", "heads=2"]


def test_star_graphs():
    """Every answer is a path of the question's edges from its start to its goal, and no other arm ends there."""
    for kind in stars.KINDS.values():
        graphs = kind.questions(40, 3)
        assert (graphs.prompts.shape[1], graphs.answers.shape[1]) == (kind.prompt_length, kind.answer_length)
        lengths = set()
        for prompt, answer in zip(graphs.prompts.tolist(), graphs.answers.tolist(), strict=True):
            text = [stars.TOKENS[token].strip() for token in prompt if token != stars.PAD]
            path = [stars.TOKENS[token].strip() for token in answer if token != stars.PAD]
            assert text[0] == "^" and text[-1] == "|" and len(set(text)) == len(text)
            edges, (start, goal) = text[1:-2], text[-2]
            assert set(path) <= set(edges) and path[0][0] == start and path[-1][1] == goal
            assert all(one[1] == two[0] for one, two in itertools.pairwise(path))
            assert sum(edge[0] == start for edge in edges) == kind.degree
            lengths.add(len(path))
        assert lengths == set(range(kind.arms[0] + kind.stem[0], kind.answer_length + 1))
        assert (kind.questions(40, 3).prompts == graphs.prompts).all()
        ids, response, attention = graphs.whole(end=True)
        assert bool((ids[:, -1] == stars.END).all()) and bool(response[:, -kind.answer_length - 1 :].all())
        assert torch.equal(attention, ids != stars.PAD)
        given = [[token for token in row if token != stars.PAD] for row in graphs.answers.tolist()]
        assert graphs.right([[*row, stars.END, 7] for row in given]) == graphs.shares(given) == [1.0] * 40
        assert (
            graphs.right([row[1:] for row in given]) == [0.0] * 40
            and 0 < sum(graphs.shares([row[1:] for row in given])) < 40
        )
    tokenizer = stars.star_tokenizer()
    ids = tokenizer("CA AD, CD")["input_ids"]
    assert [stars.TOKENS[token] for token in ids] == ["^", " CA", " AD", " CD", "|"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == " CA AD CD" and tokenizer("")["input_ids"] == [2, 3]
    for settings in ({"degree": 1}, {"arms": (0, 2)}, {"arms": (3, 2)}, {"nodes": 5}, {"nodes": 90}):
        with pytest.raises(BadInputError):
            stars.StarGraphs(**settings)


def test_what_it_learns_from(tmp_path):
    source = source_of(InsertionTraining(), None)
    batch = source.batch(6, 0)
    begins = batch.response.int().argmax(1)
    assert bool((batch.ids[torch.arange(6), begins - 1] == stars.BOS).all())
    assert torch.equal(source.batch(6, 0).ids, batch.ids) and not torch.equal(source.batch(6, 1).ids, batch.ids)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a" * (n % 3 + 1), "completion": "bc"}) + "\n" for n in range(20)))
    source = source_of(InsertionTraining(task="text", length=8), str(file))
    batch, tokenizer = source.batch(4, 0), source.tokenizer
    assert tokenizer("a")["input_ids"] == [tokenizer.cls_token_id, 97 + 3, tokenizer.bos_token_id]
    assert bool((batch.response.sum(1) == 2).all()) and bool((batch.ids[batch.response] >= 98 + 3).all())
    assert batch.attention.sum(1).min() >= 5
    windows = source_of(InsertionTraining(task="text", length=12), None).batch(2, 0)
    assert windows.ids.shape == (2, 14) and windows.response.sum(1).tolist() == [12, 12]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["star-graphs", "text"])
def test_it_trains_goes_on_and_reports(tmp_path, task):
    config = read_config(TRAINING, None, [*SMALL, f"task={task}", "length=16"])
    result = TRAINING.run(config, TrainingContext(None, None, tmp_path / "out"))
    assert result.figures["nats per token, at most"] > 0 and ("paths found" in result.figures) == (task != "text")
    again = TRAINING.run(config, TrainingContext(None, None, tmp_path / "out"))
    assert again.figures == result.figures
    folder = tmp_path / "out" / "model"
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("AB", return_tensors="pt")["input_ids"]
    assert ids[0, 0] == model.config.cls_token_id and ids[0, -1] == model.config.bos_token_id
    assert model.generate(ids, max_new_tokens=3).shape[1] <= ids.shape[1] + 3
    assert 'figure class="canvas"' in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_the_law_comes_near_to_the_data():
    """Four texts of three letters: the distance of the model's exact law to the data falls with training."""
    from everytoken.architectures.any_order.training import Batch
    from everytoken.architectures.ilm.likelihood import insertion_logp

    from .common import BOS, CLS, A, B, C, network

    texts = torch.tensor([[CLS, BOS, *row] for row in ([A, B, C], [B, B, A], [C, A, A], [C, C, B])])
    response = (torch.arange(5) > 1).expand(4, -1)

    def distance(net):
        probs = torch.stack([insertion_logp(net.eval(), text, response[0]).exp() for text in texts])
        return 0.5 * float((probs - 0.25).abs().sum() + (1 - probs.sum()))

    net = network(initializer_range=0.1, hidden_size=32)
    before = distance(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=6e-3)
    batch = Batch(texts.repeat(16, 1), response.repeat(16, 1), torch.ones(64, 5, dtype=torch.bool))
    for step in range(150):
        optimizer.zero_grad()
        loss_of(net, batch, torch.Generator().manual_seed(step)).backward()
        optimizer.step()
    after = distance(net)
    assert before > 0.9 and after < 0.5 * before


def test_a_trial_grows_a_path():
    shown = []
    request = TrialRequest([Trial("ilm", ILM, {})], stream=shown.append)
    result = trial(request)
    assert list(result.rows) == ["from left to right", "ilm"]
    assert result.texts["ilm"].split() == ["CA", "AD", "DE"]
    lines = shown[-1].splitlines()
    assert lines[:2] == ["ilm:", "step 0  ^ DE CA FG AD CF CE|"] and len(lines) == 5 and lines[-1].endswith("CA AD DE")
    assert shown[0].startswith("from left to right:\nstep 0")
    assert set(result.traces[0].columns) == {"step", "confidence", "gap"} and len(result.traces[0]) == 3
    assert 'max="3"' in result.pictures[-1] and result.rows["ilm"]["forwards"] == 4


def test_what_is_refused(tmp_path):
    for settings in ({"task": "chess"}, {"graphs": "hard"}, {"steps": 0}, {"width": 18}):
        with pytest.raises(BadInputError):
            InsertionTraining(**settings)
    with pytest.raises(BadInputError, match="scratch"):
        TRAINING.run(InsertionTraining(), TrainingContext("model", None, tmp_path))
    with pytest.raises(BadInputError, match="own graphs"):
        source_of(InsertionTraining(), "file.txt")
    with pytest.raises(BadInputError, match="longest"):
        ILM(longest=0)
    with pytest.raises(BadInputError, match="tokenizer"):
        ILM().observe(ILM.tiny(), None, "AB")
