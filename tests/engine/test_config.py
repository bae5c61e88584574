"""The configuration: how values are read, that no key is dead or undocumented, and that nothing changes unseen."""

import ast
import copy
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

import engine
from engine import Config, EngineError, load_config
from engine.config import CONFIGS, valid_keys
from engine.objectives.settings import REWARDED, Kind, Objective
from engine.section import Section

# design.md's fixed names, as far as they exist, each with a value that it must take.
FIXED = {
    "output_dir": "somewhere",
    "seed": 7,
    "precision": "bf16",
    "iterations": 3,
    "resume": "auto",
    "teacher.path": "digits",
    "teacher.steps": 20,
    "teacher.guidance": 2.5,
    "student.steps": 4,
    "student.guidance": 1.5,
    "student.init": "teacher",
    "policy.kind": "cps",
    "policy.eta": 0.25,
    "rollout.conditions": 6,
    "rollout.group_size": 5,
    "rollout.pairing": "prompt",
    "prompts.path": "prompts.txt",
    "reward.terms": {"feature": 0.5, "pixel": 2.0},
    "advantage.scale": "global_std",
    "advantage.clip": 3.5,
    "objective.kind": "ppo",
    "objective.clip_range": 0.02,
    "objective.kl_coef": 0.1,
    "objective.kl_kind": "chi2",
    "optimizer.kind": "adamw8bit",
    "optimizer.lr": 2e-6,
    "train.micro_batch": 9,
    "train.inner_epochs": 2,
    "zero.stage": 2,
    "zero.offload": "optimizer",
    "evaluation.every": 4,
    "evaluation.samples": 1500,
    "checkpoint.every": 11,
    "checkpoint.keep": 3,
}
LEAVES = [key for key in valid_keys() if not any(other.startswith(f"{key}.") for other in valid_keys())]


def value_of(config: Config, key: str) -> object:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=1e-5", 1e-5),
        ("optimizer.lr=2.5e-4", 2.5e-4),
        ("optimizer.lr=1E-3", 1e-3),
        ("iterations=12", 12),
        ("advantage.clip=null", None),
        ("advantage.clip=~", None),
        ("logging.tensorboard=false", False),
        ("logging.wandb=yes", True),
        ("objective.clip_range=[1e-4, 2e-4]", (1e-4, 2e-4)),
        ("objective.clip_range=[0.1, 0.2]", (0.1, 0.2)),
        ("optimizer.betas=[0.5, 0.75]", (0.5, 0.75)),
        ("reward.terms={pixel: 2, feature: 1e-1}", {"pixel": 2.0, "feature": 0.1}),
        ("reward.terms.pixel=1e-2", 0.01),
        ("zero.deepspeed={flops: {enabled: true, top: 1e3}}", {"flops": {"enabled": True, "top": 1000.0}}),
        ("zero.deepspeed.zero_optimization.reduce_bucket_size=1000", 1000),
        ("output_dir=runs/a=b", "runs/a=b"),
        ('output_dir="5"', "5"),
    ],
)  # fmt: skip
def test_the_value_of_an_override_is_read_as_yaml(override, expected):
    value = value_of(load_config({}, [override]), override.partition("=")[0])
    assert value == expected
    assert type(value) is type(expected)


def test_later_overrides_win_and_leave_the_other_keys_of_their_section():
    tree = {"teacher": {"steps": 30, "guidance": 2.0}, "student": {"steps": 3}}
    config = load_config(tree, ["teacher.steps=20", "teacher.steps=25"])
    assert (config.teacher.steps, config.teacher.guidance, config.student.steps) == (25, 2.0, 3)


def test_a_section_can_be_replaced_by_one_override():
    config = load_config({"teacher": {"steps": 30}}, ["teacher={steps: 20, guidance: 3}"])
    assert (config.teacher.steps, config.teacher.guidance) == (20, 3.0)


def test_every_fixed_key_is_accepted_by_its_name():
    config = load_config(
        {}, [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in FIXED.items()]
    )
    assert {key: value_of(config, key) for key in FIXED} == FIXED


def test_shipped_files_are_valid_and_set_something():
    files = sorted(CONFIGS.glob("*.yaml"))
    assert "digits.yaml" in [file.name for file in files]
    for file in files:
        assert yaml.safe_load(file.read_text())
        load_config(file)


def test_without_a_source_the_embedded_digits_are_distilled():
    assert load_config() == load_config(CONFIGS / "digits.yaml")
    assert load_config().teacher.path == "digits"


def test_numbers_of_a_file_are_read_like_those_of_an_override(tmp_path):
    (tmp_path / "mine.yaml").write_text("optimizer: {lr: 1e-5}\nzero: {deepspeed: {top: 1e3, name: '1e3'}}\n")
    config = load_config(tmp_path / "mine.yaml")
    assert (config.optimizer.lr, config.zero.deepspeed) == (1e-5, {"top": 1000.0, "name": "1e3"})


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "empty.yaml") == Config()


def test_every_key_has_a_docstring_where_it_is_declared():
    undocumented, sections = [], set()
    for module in (Config.__module__, Objective.__module__):
        classes = vars(sys.modules[module]).values()
        sections |= {c.__name__ for c in classes if isinstance(c, type) and issubclass(c, Section) and c is not Section}
    sources = [Path(sys.modules[module].__file__).read_text() for module in (Config.__module__, Objective.__module__)]
    for node in [node for source in sources for node in ast.parse(source).body]:
        if not isinstance(node, ast.ClassDef) or node.name not in sections:
            continue
        for line, below in zip(node.body, [*node.body[1:], None], strict=True):
            is_key = isinstance(line, ast.AnnAssign) and ast.unparse(line.annotation) not in sections
            if is_key and not (isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)):
                undocumented.append(f"{node.name}.{line.target.id}")
    assert sections > {"Config", "Teacher", "Objective"}
    assert undocumented == []


@pytest.mark.usefixtures("quick_finish")
def test_every_key_is_read_by_a_run(tmp_path, tiny_config, tiny_pipeline, clip, monkeypatch):
    """What only refuses keys, each alone or with others, is no reader."""
    read, checking = set(), {Config.__module__, Objective.__module__, "engine.conflicts"}

    def record(self, name):
        if name in type(self).model_fields and sys._getframe(1).f_globals["__name__"] not in checking:
            read.add((type(self), name))
        return object.__getattribute__(self, name)

    def section_of(key):
        section = Config
        for part in key.split(".")[:-1]:
            section = section.model_fields[part].annotation
        return section

    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"text": "a cat {i}"}}\n' for i in range(12)))
    smaller = ["objective.kind=ppo", "student.architecture={layers_per_block: 2}", "cloning.iterations=1"]
    adapted = [
        f"teacher.path={tiny_pipeline('sd')}",
        f"prompts.path={tmp_path / 'prompts.jsonl'}",
        "prompts.held_out=0.5",
        "reward.terms={pixel: 1}",
        "lora.rank=2",
        "train.ratio_tolerance=0.01",
    ]
    distilling = ["iterations=1", "train.batch_size=4", "objective.progressive.stages=[3]"]
    distilling += ["objective.regression.loss=huber", "objective.vardiu.posterior.head=flow"]
    distilling += [f"objective.flash_dmd.encoder={{path: {clip}, layers: [1]}}"]
    distilling += [f"objective.joined.{kind}=1" for kind in get_args(Kind) if kind not in REWARDED]
    settings = ([], smaller, adapted, distilling)
    configs = [tiny_config(tmp_path / f"run{i}", *overrides) for i, overrides in enumerate(settings)]
    monkeypatch.setattr(Section, "__getattribute__", record, raising=False)
    for config in configs:
        engine.distill(config)
    assert [key for key in LEAVES if (section_of(key), key.split(".")[-1]) not in read] == []


def test_a_configuration_is_immutable():
    config = load_config({})
    for target, name in [(config, "seed"), (config.teacher, "steps"), (config.zero, "stage"), (config, "teacher")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(target, name, getattr(target, name))
    with pytest.raises(ValidationError, match="frozen"):
        del config.seed
    with pytest.raises((ValidationError, ValueError)):
        config.new_key = 1


def test_configurations_share_no_mapping():
    first, second = load_config({}), load_config({})
    assert first.reward.terms is not second.reward.terms
    assert first.zero.deepspeed is not second.zero.deepspeed
    assert load_config(first).reward.terms is not first.reward.terms


def test_path_mapping_and_config_give_equal_configurations(tmp_path):
    tree = {"iterations": 3, "reward": {"terms": {"pixel": 1.0}}, "objective": {"clip_range": [0.1, 0.2]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    config = load_config(tree)
    assert load_config(tmp_path / "mine.yaml") == load_config(str(tmp_path / "mine.yaml")) == config
    assert load_config(config) == config
    assert load_config(config.as_dict()) == config
    assert load_config(config, ["iterations=4"]).iterations == 4
    assert config.iterations == 3


def test_the_config_yaml_of_a_run_loads_to_an_equal_configuration(tmp_path):
    config = load_config(
        {}, [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in FIXED.items()]
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml").as_dict() == config.as_dict()


def test_the_mapping_of_a_user_is_never_changed():
    tree = {
        "teacher": {"steps": 30},
        "reward": {"terms": {"pixel": 1.0}},
        "zero": {"deepspeed": {"flops": {"on": True}}},
    }
    before = copy.deepcopy(tree)
    load_config(tree, ["teacher.steps=20", "reward.terms.feature=2", "zero.deepspeed.flops.on=false", "seed=3"])
    assert tree == before


@pytest.mark.parametrize("key", ["learning_rate", "teacher.step", "objectve.kind", "rollout.pol", "train.microbatch"])
def test_an_unknown_key_is_refused_alike_in_files_mappings_and_overrides(tmp_path, key):
    section, _, name = key.rpartition(".")
    tree = {section: {name: 1}} if section else {name: 1}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(tree))
    messages = []
    for arguments in [(tree,), (tmp_path / "bad.yaml",), ({}, [f"{key}=1"])]:
        with pytest.raises(EngineError, match="nearest valid key") as error:
            load_config(*arguments)
        messages.append(str(error.value))
        assert str(error.value).rpartition("valid key is ")[2].strip("'") in valid_keys()
    assert messages[0] == messages[1]
