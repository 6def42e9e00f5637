"""``everytoken train`` for every method on a tiny model: configuration, checkpoints, report, refusals."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

pytest.importorskip("trl")

from everytoken.catalog import find_card
from everytoken.cli.app import app
from everytoken.core.errors import BadInputError
from everytoken.core.settings import settable
from everytoken.preference.ift_training import demonstrations
from everytoken.preference.tgdpo import GuideLogps, TGDPOLoss
from everytoken.training.base import TrainingContext, read_config

from ..conftest import tiny_llama
from ..tiers import commit_tier

LETTERS = "abcdefghijklmnopqrstuvwxyz .,"
ROWS = [
    {"prompt": f"the {thing} was", "chosen": f" {good}.", "rejected": f" {bad}."}
    for thing, good, bad in (
        ("film", "lovely", "awful"), ("food", "kind", "cold"), ("house", "quiet", "loud"), ("train", "clean", "dirty"),
        ("city", "a joy", "a bore"), ("trip", "the best", "a waste"),
    )
]  # fmt: skip
SMALL = ["batch_size=2", "steps=2", "samples=1", "sample_tokens=4", "lr=0.001"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return letters(tmp_path_factory.mktemp("train"))


def letters(folder):
    """A tiny model with a tokenizer of letters, and data, in a folder."""
    from everytoken.reproduce.beds.small_models import character_tokenizer

    tokenizer = character_tokenizer(LETTERS)
    for name, seed in (("model", 1), ("guide", 2)):
        model = tiny_llama(len(tokenizer), seed=seed, eos=tokenizer.eos_token_id)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def invoke(place, name, out, *settings, data="pairs.jsonl"):
    options = [item for setting in [*SMALL, *settings] for item in ("--set", setting)]
    return CliRunner().invoke(
        app,
        [
            "train",
            name,
            "--model",
            str(place / "model"),
            "--data",
            str(place / data),
            "--out",
            str(out),
            "--json",
            *options,
        ],
    )


METHODS = {
    "tdpo": ["save_steps=1"],
    "tgdpo": ["guide_steps=1", "precompute_reference=true"],
    "t-reg": ["lora_r=2"],
    "cdpo": ["guide_steps=1", "accumulation=2"],
    "ift": ["residual=0.5"],
    "rto": ["guide_steps=1", "batch_size=4", "num_generations=2", "reward=tests.preference.test_training:brief"],
}


def brief(completions, **_):
    """A reward: shorter is better."""
    return [-float(len(text)) for text in completions]


SEEN = []


def near(completions, wanted, source, **_):
    """A reward that reads columns of the data: as long as ``wanted``."""
    SEEN.extend(zip(wanted, source, strict=True))
    return [-abs(len(text) - length) for text, length in zip(completions, wanted, strict=True)]


@pytest.mark.parametrize("name", commit_tier(METHODS, ["tdpo", "rto"]))
def test_every_method_trains_and_reports(place, tmp_path, name):
    result = invoke(place, name, tmp_path / "out", *METHODS[name])
    assert result.exit_code == 0, result.output + str(result.exception)
    figures = json.loads(result.stdout[result.stdout.index("{") :])["figures"]
    assert all(value == value for value in figures.values())
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["method"] == name
    assert record["settings"]["lr"] == 0.001
    assert record["curves"]
    page = (tmp_path / "out" / "report.html").read_text()
    for piece in ("Final evaluation", "Curves", "Before and after", "Credit of every token", "data:image/svg+xml"):
        assert piece in page, piece
    assert not re.search(r'(src|href)="http', page)  # self-contained
    column = {
        "tgdpo": "weight",
        "cdpo": "criticality",
        "t-reg": "contrast_of_prompts",
        "ift": "weight",
        "rto": "dpo_reward",
    }
    assert f'"{column.get(name, "implicit_reward")}"' in page
    if name == "t-reg":
        adapter = json.loads((tmp_path / "out" / "model" / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(place / "model")
    else:
        from transformers import AutoModelForCausalLM

        trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        start = AutoModelForCausalLM.from_pretrained(place / "model")
        moved = max((a - b).abs().max() for a, b in zip(trained.parameters(), start.parameters(), strict=True))
        assert moved > 1e-4
    assert (tmp_path / "out" / "checkpoints").exists() == (name == "tdpo")


@pytest.mark.slow
def test_a_second_run_goes_on_from_the_last_checkpoint(place, tmp_path):
    invoke(place, "tdpo", tmp_path / "out", "save_steps=1")
    result = invoke(place, "tdpo", tmp_path / "out", "save_steps=1", "steps=4")
    assert result.exit_code == 0, result.output
    steps = [step for step, _ in json.loads((tmp_path / "out" / "training.json").read_text())["curves"]["loss"]]
    assert steps == [1, 2, 3, 4]
    fresh = invoke(place, "tdpo", tmp_path / "other", "steps=4")
    assert fresh.exit_code == 0
    from transformers import AutoModelForCausalLM

    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("out", "other"))
    gap = max((a - b).abs().max() for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert gap < 1e-2  # the schedule of the first run was shorter


@pytest.mark.slow
def test_guides_can_be_brought(place, tmp_path):
    for name, settings in (
        ("tgdpo", [f"guide={place / 'guide'}"]),
        ("cdpo", [f"positive={place / 'guide'}", f"negative={place / 'model'}"]),
        (
            "rto",
            [
                f"dpo={place / 'guide'}",
                "batch_size=4",
                "num_generations=2",
                "estimator=group",
                "reward=tests.preference.test_training:brief",
            ],
        ),
    ):
        result = invoke(place, name, tmp_path / name, *settings)
        assert result.exit_code == 0, result.output + str(result.exception)


def test_the_yaml_and_the_command_line_meet_in_one_typed_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("alpha: 1\nlr: 1e-4\nguide: null\nmonitor_kl: no\n")
    training = find_card("tgdpo").load_training()
    config = read_config(training, tmp_path / "c.yaml", ["alpha=2", "clamp=0.5", "guide_steps=7"])
    assert config == training.config(alpha=2.0, lr=1e-4, monitor_kl=False, clamp=0.5, guide_steps=7)
    assert config.part(TGDPOLoss) == TGDPOLoss(alpha=2.0, clamp=0.5)
    assert config.part(GuideLogps) == GuideLogps(guide_steps=7)


BAD = [
    ("tdpo", ["variant=x"], "Unknown variant"),
    ("tdpo", ["batch_size=0"], "batch_size must be"),
    ("tdpo", ["eval_share=1"], "eval_share"),
    ("tdpo", ["dtype=int4"], "Unknown dtype"),
    ("tdpo", ["precompute_reference=true"], "needs the reference's distributions"),
    ("tgdpo", ["aplha=1"], "Did you mean alpha"),
    ("tgdpo", ["guide_steps=0"], "guide_steps and guide_lr must be positive"),
    ("cdpo", ["guide_lora_r=-1"], "guide_lora_r not negative"),
    ("ift", ["norm=l9"], "Unknown norm"),
    ("rto", ["batch_size=3"], "no multiple of num_generations"),
    ("rto", ["batch_size=8", "reward=nowhere:f"], "no module"),
    ("rto", ["batch_size=8", "gamma=2"], "gamma lies"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_settings_are_refused_before_anything_is_loaded(place, tmp_path, monkeypatch, name, settings, message):
    def never(*_args, **_kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("everytoken.core.loading.load_model", never)
    result = invoke(place, name, tmp_path / "out", *settings)
    assert result.exit_code != 0
    assert message in str(result.exception)


def test_bad_data_is_named(place, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the film was"}\n{"prompt": ""}\n')
    (tmp_path / "good.jsonl").write_text('{"prompt": "the film was"}\n{"prompt": "the food was"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    (tmp_path / "other.jsonl").write_text('{"question": "a"}\n')
    context = TrainingContext(str(place / "model"), None, tmp_path / "out")
    for name, data, message in (
        ("tgdpo", "one.jsonl", "1 row"),
        ("rto", "prompts.jsonl", "row 1: 'prompt'"),
        ("rto", "good.jsonl", "RTO needs a DPO-trained model"),
    ):
        context.data = str(tmp_path / data)
        training = find_card(name).load_training()
        with pytest.raises(BadInputError, match=message):
            training.run(training.config(), context)
    (tmp_path / "tools.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "tools": [{"name": "look"}]}\n')
    context.data, rto = str(tmp_path / "tools.jsonl"), find_card("rto").load_training()
    with pytest.raises(BadInputError, match="row 1: RTO's rollouts call no tools"):
        rto.run(rto.config(dpo=str(place / "guide")), context)
    mixed = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}]
    pictured = [{"prompt": "a"}, {"prompt": "b", "image": "b.png"}]
    for rows, message in ((mixed, "row 1: its prompt is no str"), (pictured, "row 1: RTO scores text only")):
        (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        context.data = str(tmp_path / "odd.jsonl")
        with pytest.raises(BadInputError, match=message):
            rto.run(rto.config(dpo=str(place / "guide")), context)
    with pytest.raises(BadInputError, match="row 1: 'completion' is empty"):
        demonstrations(tmp_path / "half.jsonl")
    with pytest.raises(BadInputError, match="row 0 has question"):
        demonstrations(tmp_path / "other.jsonl")
    assert demonstrations(place / "pairs.jsonl")[0] == {"prompt": ROWS[0]["prompt"], "completion": ROWS[0]["chosen"]}


COLUMNS = [
    {"prompt": "the film was", "wanted": 3},
    {"prompt": "the film was", "wanted": 5, "source": {"page": 2}},
    {"prompt": "the food was", "wanted": 4, "tools": []},
]


def test_rto_keeps_the_columns_of_the_data(place, tmp_path):
    """Every column, also one that the first row lacks; a repeated prompt with other columns is another row."""
    from everytoken.reinforcement.rto_training import RTOTraining, prompts_and_pairs
    from everytoken.training.datasets.pairs import dataset_of

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*COLUMNS, COLUMNS[1]]))
    context = TrainingContext(str(place / "model"), str(tmp_path / "rows.jsonl"), tmp_path / "out")
    found, pairs = prompts_and_pairs(RTOTraining(dpo_reward_scale=0.0), context)
    assert pairs is None
    rows = dataset_of(found)
    assert rows["wanted"][:] == [3, 5, 4] and rows["source"][:] == [None, {"page": 2}, None]
    assert set(rows.column_names) == {"prompt", "wanted", "source"}


@pytest.mark.slow
def test_rtos_reward_is_given_the_columns_of_the_data(place, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in COLUMNS))
    small = ["batch_size=2", "num_generations=2", "steps=3", "eval_share=0.01", "estimator=group"]
    rto = find_card("rto").load_training()
    config = read_config(rto, None, [*SMALL, *small, "reward=tests.preference.test_training:near"])
    config.dpo_reward_scale = 0.0
    SEEN.clear()
    rto.run(config, TrainingContext(str(place / "model"), str(tmp_path / "rows.jsonl"), tmp_path / "out"))
    known = [(row["wanted"], row.get("source")) for row in COLUMNS]
    assert len(SEEN) == 6 and all(pair in known for pair in SEEN) and len({wanted for wanted, _ in SEEN}) == 2


def test_the_reports_texts_are_answers_to_what_was_trained(place, tmp_path, monkeypatch):
    """With the rows' tools and their messages' parts, as the trainer reads them."""
    from datasets import Dataset

    from everytoken.training.session import TrainingSession

    config = find_card("tdpo").load_training().config(samples=2, sample_tokens=3)
    session = TrainingSession(config, TrainingContext(str(place / "model"), None, tmp_path), "tdpo", {})
    session.tokenizer.chat_template = "{{ tools[0].name }} {% for m in messages %}{{ m.content }}{% endfor %}, "
    asked = [{"role": "user", "content": [{"type": "text", "text": "why"}]}]
    rows = [{"prompt": asked, "tools": [{"name": name}]} for name in ("look", "ask", "go")]
    read = []
    original = type(session.policy).generate

    def generate(self, ids, **arguments):
        read.append(session.tokenizer.decode(ids[0]))
        return original(self, ids, **arguments)

    monkeypatch.setattr(type(session.policy), "generate", generate)
    answered = session.sampled(Dataset.from_list(rows))
    assert len(session.write_texts(session.policy, answered)) == 2
    assert read == ["look why, ", "ask why, "]
    assert session.sampled(Dataset.from_list([{"chosen": "a"}])) == []


def test_an_adapter_names_its_base_as_the_user_did(tmp_path):
    """Not where the base lay on this machine, which says nothing elsewhere."""
    from everytoken.core.converted import EMBEDDED
    from everytoken.training.session import name_base

    name_base(tmp_path, "org/model")  # a whole model has no adapter's file
    assert not list(tmp_path.iterdir())
    file = tmp_path / "adapter_config.json"
    for given, kept in (("org/model", "org/model"), ("models/mine", "models/mine"), (None, EMBEDDED)):
        file.write_text(json.dumps({"base_model_name_or_path": "/root/cache/model", "r": 2}))
        name_base(tmp_path, given)
        assert json.loads(file.read_text()) == {"base_model_name_or_path": kept, "r": 2}


@pytest.mark.slow
def test_an_interruption_leaves_a_checkpoint(place, tmp_path, monkeypatch):
    from everytoken.preference.trainer import PreferenceTrainer

    original = PreferenceTrainer._compute_loss

    def stop_at_two(self, *args):
        if self.state.global_step == 2 and self.model.training:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(PreferenceTrainer, "_compute_loss", stop_at_two)
    result = invoke(place, "tdpo", tmp_path / "out", "save_steps=50", "steps=4")
    assert result.exit_code != 0
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-2").is_dir()
    monkeypatch.undo()
    assert invoke(place, "tdpo", tmp_path / "out", "save_steps=50", "steps=4").exit_code == 0


@pytest.mark.parametrize("name", METHODS)
def test_the_shipped_configurations_are_valid(name):
    """The papers' settings, as YAML files beside the package."""
    from pathlib import Path

    chosen = read_config(
        find_card(name).load_training(), Path(__file__).parents[2] / "configs" / "train" / f"{name}.yaml", []
    )
    assert chosen.bf16


FIELDS_OF_0_1 = {
    "tdpo": "alpha variant",
    "tgdpo": "alpha clamp guide guide_steps guide_lr",
    "t-reg": "alpha base gamma pair_weight reduction better worse",
    "cdpo": "weight_chosen label_smoothing positive negative contrast guide_steps tune_lr guide_lora_r",
    "ift": "residual gamma propagation side norm top_k temperature residual_warmup noise detach_weights reduction",
    "rto": "estimator dpo_reward_scale dpo_reward_clip init_kl_coef reward_scale reward_clip normalize_rewards gamma "
    "gae_lambda critic_lr critic_epochs value_clip reward dpo guide_steps guide_lr num_generations num_iterations",
}
SHARED_OF_0_1 = (
    "steps epochs batch_size accumulation lr warmup lora_r dtype bf16 gradient_checkpointing max_length eval_share "
    "save_steps log_steps samples sample_tokens seed resume"
)


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_the_first_release_keep_their_names(name):
    """YAML files of 0.1 load unchanged."""
    pairs = "" if name in ("ift", "rto") else "beta precompute_reference monitor_kl"
    known = settable(find_card(name).load_training().config)
    assert set(f"{SHARED_OF_0_1} {pairs} {FIELDS_OF_0_1[name]}".split()) <= set(known)
