"""Wrong input is refused in one paragraph that names the key, the value and what is allowed, and nothing is written."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.train

pytestmark = pytest.mark.usefixtures("quick_finish")

UNET = Path("unet") / "diffusion_pytorch_model.safetensors"


# (overrides, what the message must hold: the key, the value, what is allowed)
WRONG = {
    # keys that do not exist
    "top level key": (["iteration=5"], "'iteration'", "'iterations'"),
    "nested key": (["student.step=3"], "'student.step'", "'student.steps'"),
    "section": (["optimiser.lr=1e-4"], "'optimiser.lr'", "'optimizer.lr'"),
    "key below a key": (["teacher.steps.x=3"], "'teacher.steps.x'", "'teacher.steps'"),
    "key in a mapping": (["rollout={grop_size: 3}"], "'rollout.grop_size'", "'rollout.group_size'"),
    # types
    "word for a number": (["teacher.steps=many"], "teacher.steps='many'", "integer"),
    "fraction for a count": (["teacher.steps=2.5"], "teacher.steps=2.5", "integer"),
    "word for a rate": (["optimizer.lr=fast"], "optimizer.lr='fast'", "number"),
    "word for a switch": (["logging.tensorboard=maybe"], "logging.tensorboard='maybe'", "boolean"),
    "nothing for a path": (["teacher.path=null"], "teacher.path=None", "string"),
    "number for a section": (["teacher=5"], "teacher=5", "section of keys", "teacher.path"),
    "one beta": (["optimizer.betas=[0.9]"], "optimizer.betas=[0.9]", "item 1", "required"),
    "word for the clip range": (["objective.clip_range=wide"], "objective.clip_range='wide'", "number", "or", "tuple"),
    "list for DeepSpeed": (["zero.deepspeed=[1]"], "zero.deepspeed=[1]", "dictionary"),
    # ranges
    "no iterations": (["iterations=0"], "iterations=0", "greater than or equal to 1"),
    "negative seed": (["seed=-1"], "seed=-1", "greater than or equal to 0"),
    "no noise": (["policy.eta=0"], "policy.eta=0", "greater than 0"),
    "noise that is not a number": (["policy.eta=.nan"], "policy.eta=nan", "finite number"),
    "more noise than there is": (["policy.eta=3"], "policy.eta=3", "policy.kind=ddim", "eta <= 1"),
    "endless guidance": (["student.guidance=.inf"], "student.guidance=inf", "finite number"),
    "negative guidance": (["teacher.guidance=-1"], "teacher.guidance=-1", "greater than or equal to 0"),
    "second beta of 1.5": (["optimizer.betas=[0.9, 1.5]"], "optimizer.betas=[0.9, 1.5]", "item 1", "less than 1"),
    "negative clip range": (["objective.clip_range=-1"], "objective.clip_range=-1", "greater than 0"),
    "negative upper clip range": (["objective.clip_range=[0.1, -1]"], "objective.clip_range=[0.1, -1]", "item 1"),
    "average that never moves": (["ema.decay=1"], "ema.decay=1", "less than 1"),
    "no checkpoint kept": (["checkpoint.keep=0"], "checkpoint.keep=0", "greater than or equal to 1"),
    "ZeRO stage 4": (["zero.stage=4"], "zero.stage=4", "0, 1, 2 or 3"),
    # words that are none of the allowed ones
    "precision": (["precision=fp8"], "precision='fp8'", "'fp32', 'bf16' or 'fp16'"),
    "policy": (["policy.kind=dim"], "policy.kind='dim'", "'ddim'", "'cps'"),
    "objective": (["objective.kind=trpo"], "objective.kind='trpo'", "'grpo'", "'ppo'"),
    "scale": (["advantage.scale=std"], "advantage.scale='std'", "'group_std', 'global_std' or 'none'"),
    # sizes that do not fit each other
    "more conditions than the pool": (["rollout.conditions=9"], "rollout.conditions=9", "rollout.pool=8"),
    "group of one": (["rollout.group_size=1"], "rollout.group_size=1", "at least 2", "objective.kind=ppo"),
    "updates that do not divide": (["train.updates=3"], "train.updates=3", "8 (sample, step)", "1, 2, 4, 8"),
    "window beyond the steps": (["policy.window=3"], "policy.window=3", "2 stochastic steps", "3-step student"),
    "student of one step": (["student.steps=1"], "student.steps=1", "no stochastic step", "use more steps"),
    "student longer than teacher": (["student.steps=7"], "student.steps=7", "teacher.steps=6"),
    "teacher beyond its schedule": (["teacher.steps=1001"], "teacher.steps=1001", "between 1 and 1000"),
    "few evaluation samples": (["evaluation.samples=20"], "evaluation.samples=20", "at least 100"),
    "divergence without its order": (["objective.kl_kind=renyi"], "objective.kl_alpha=None", "renyi", "0 and 1"),
    "more parts than conditions": (["rollout.chunks=5"], "rollout.chunks=5", "rollout.conditions=4"),
    "order without meaning": (["objective={kl_kind: power, kl_alpha: 1}"], "objective.kl_alpha=1", "power", "0 and 1"),
    "offload without partitions": (["zero.offload=optimizer"], "zero.offload=optimizer", "zero.stage >= 1"),
    "parameters with optimizer states only": (
        ["zero.offload=parameters", "zero.stage=2"],
        "zero.offload=parameters",
        "zero.stage >= 3",
        "zero.stage=2",
    ),
    "DeepSpeed key that ours decide": (["zero.deepspeed.train_batch_size=8"], "zero.deepspeed.train_batch_size", "=16"),
    "DeepSpeed key below one that ours decide": (
        ["zero.deepspeed.bf16.enabled=true"],
        "zero.deepspeed.bf16.enabled",
        "leave it out",
    ),
    # students of other weights
    "architecture without cloning": (
        ["student.architecture={layers_per_block: 2}"],
        "cloning.iterations=0",
        "random weights",
        "such as 1000",
    ),
    "architecture and a directory": (
        ["student.architecture={layers_per_block: 2}", "student.init=/a/student", "cloning.iterations=1"],
        "student.init=/a/student",
        "leave one of the two out",
    ),
    "entry of no architecture": (
        ["student.architecture={block_channels: 4}", "cloning.iterations=1"],
        "student.architecture.block_channels",
        "UNet2DModel",
        "block_out_channels",
    ),
    "pattern of no parameter": (["student.trainable=attn"], "student.trainable=attn", "none", "conv_in"),
    "adapters of no layer": (["lora.rank=2", "lora.target=attn"], "lora.target", "'attn'", "time_emb_proj"),
    "adapters of attention that is not there": (["lora.rank=2"], "lora.target", "UNet2DModel", "time_emb_proj"),
    # rewards
    "misspelt reward": (["reward.terms={featur: 1}"], "reward.terms", "'featur'", "'feature'", "class_log_prob"),
    "reward of weight 0": (["reward.terms={pixel: 0}"], "reward.terms", "{'pixel': 0.0}", "feature, class_log_prob"),
    "no reward": (["reward.terms={}"], "reward.terms", "at least one of feature, class_log_prob, pixel"),
    "word for a weight": (["reward.terms={pixel: much}"], "reward.terms.pixel='much'", "number"),
    "endless weight": (["reward.terms={pixel: .inf}"], "reward.terms.pixel=inf", "finite"),
    # what this machine and this teacher cannot do
    "fp16 on a CPU": (["precision=fp16"], "precision=fp16", "GPU", "fp32 or bf16"),
    "prompts for classes": (["prompts.path=prompts.txt"], "prompts.path=prompts.txt", "classes, not on text"),
    "flow sampler of a diffusion teacher": (["policy.kind=cps"], "policy.kind=cps", "fitting kinds: ddim"),
    # paths
    "teacher that is not there": (["teacher.path=/no/where"], "teacher.path", "/no/where", "diffusers format"),
    "student that is not there": (["student.init=/no/where"], "student.init", "/no/where", "diffusers format"),
    "resume from nowhere": (["resume=/no/where"], "resume=/no/where", "auto", "run directory"),
    "configuration that is not there": (["--config", "/no/where.yaml"], "/no/where.yaml", "digits.yaml"),
    # overrides
    "override without a value": (["iterations"], "'iterations'", "key=value"),
    "override without a key": (["=5"], "'=5'", "key=value"),
    "override that is not YAML": (["policy.kind=[ddim"], "'policy.kind=[ddim'", "not YAML"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_by_name(refused, case):
    overrides, *expected = WRONG[case]
    refused(*overrides, says=expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("teacher: {steps: 6", ("mine.yaml", "not YAML", "line 1")),
        ("- a\n- b\n", ("mine.yaml", "list", "mapping of keys")),
        ("hello\n", ("mine.yaml", "str", "mapping of keys")),
        ("\ud800".encode("utf-16", "surrogatepass").decode("latin-1"), ("mine.yaml", "not YAML")),
        ("teacher:\n", ("teacher=None", "section of keys")),
    ],
)
def test_a_configuration_file_that_holds_something_else_is_refused(tmp_path, capsys, text, expected):
    (tmp_path / "mine.yaml").write_bytes(text.encode("latin-1"))
    assert engine.train.main(["--config", str(tmp_path / "mine.yaml"), f"output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in ("error: ", *expected)), error
    assert not (tmp_path / "out").exists()


def no_unet(teacher):
    shutil.rmtree(teacher / "unet")


def no_scheduler(teacher):
    shutil.rmtree(teacher / "scheduler")


def cut_config(teacher):
    path = teacher / "unet" / "config.json"
    path.write_text(path.read_text()[:100])


def config_of_a_list(teacher):
    (teacher / "unet" / "config.json").write_text("[]")


def cut_scheduler(teacher):
    (teacher / "scheduler" / "scheduler_config.json").write_text('{"_class_name": ')


def no_weights(teacher):
    (teacher / UNET).unlink()


def cut_weights(teacher):
    path = teacher / UNET
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_config(**change):
    def damage(teacher):
        path = teacher / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def change_scheduler(**change):
    def damage(teacher):
        path = teacher / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def nan_weight(teacher):
    weights = load_file(teacher / UNET)
    weights["conv_in.weight"][0, 0, 0, 0] = torch.nan
    save_file(weights, teacher / UNET, metadata={"format": "pt"})


DAMAGED = {
    "without unet/": (no_unet, "unet/config.json", "diffusers format"),
    "without scheduler/": (no_scheduler, "no scheduler/", "model_index.json", "whole directory"),
    "with a cut config.json": (cut_config, "unet/config.json", "corrupt"),
    "with a list for config.json": (config_of_a_list, "unet/config.json", "list"),
    "with a cut scheduler_config.json": (cut_scheduler, "scheduler_config.json", "corrupt"),
    "without weights": (no_weights, "cannot be loaded"),
    "with cut weights": (cut_weights, "cannot be loaded"),
    "of another class": (change_config(_class_name="Transformer2DModel"), "Transformer2DModel", "UNet2DModel"),
    "of weights that do not fit": (change_config(block_out_channels=[8, 32]), "cannot be loaded"),
    "without classes": (change_config(num_class_embeds=None), "num_class_embeds=None", "null class"),
    "of an unknown prediction": (change_scheduler(prediction_type="score"), "prediction_type='score'", "epsilon"),
    "with a weight that is not a number": (nan_weight, "not finite", "conv_in.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_teacher_is_refused_by_what_is_wrong_with_it(refused, tmp_path, tiny_teacher, case):
    damage, *expected = DAMAGED[case]
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    damage(teacher)
    refused(f"teacher.path={teacher}", says=("teacher.", *expected))


@pytest.mark.parametrize("case", ["with cut weights", "with a weight that is not a number"])
def test_a_damaged_student_is_refused_under_its_own_key(refused, tmp_path, tiny_teacher, case):
    damage, *expected = DAMAGED[case]
    student = shutil.copytree(tiny_teacher, tmp_path / "student")
    damage(student)
    refused(f"student.init={student}", says=("student.init", *expected))


def test_a_student_of_another_architecture_is_refused(refused, tmp_path, write_teacher):
    from diffusers import DDIMScheduler

    student = write_teacher(tmp_path / "student", DDIMScheduler(clip_sample=False), block_out_channels=(8, 32))
    refused(f"student.init={student}", says=("student.init", str(student), "another architecture", "differ"))


def test_a_student_of_another_schedule_is_refused(refused, tiny_flow_teacher, tmp_path, tiny_teacher):
    expected = ("student.init", "another noise schedule", "teacher")
    refused(f"student.init={tiny_flow_teacher}", says=expected)
    student = shutil.copytree(tiny_teacher, tmp_path / "student")
    change_scheduler(beta_end=0.01)(student)
    refused(f"student.init={student}", says=expected)


def test_the_diffusion_sampler_of_a_flow_teacher_is_refused(refused, tiny_flow_teacher):
    expected = ("policy.kind=ddim", "FlowSchedule", "flow_sde, dance_sde, cps")
    refused(f"teacher.path={tiny_flow_teacher}", says=expected)


@pytest.mark.parametrize("change", [{"sample_size": 16}, {"num_class_embeds": 6}])
@pytest.mark.parametrize("term", ["feature", "class_log_prob"])
def test_digit_rewards_of_a_teacher_of_other_images_are_refused(refused, tmp_path, write_teacher, change, term):
    from diffusers import DDIMScheduler

    teacher = write_teacher(tmp_path / "teacher", DDIMScheduler(clip_sample=False), **change)
    refused(
        f"teacher.path={teacher}",
        f"reward.terms={{{term}: 1}}",
        says=("reward.terms", term, "10 classes of (1, 8, 8)", "Use pixel"),
    )


def test_wandb_that_is_not_installed_is_refused(refused, monkeypatch):
    usual = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "wandb" else usual(name))
    refused("logging.wandb=true", says=("logging.wandb=true", "not installed", "pip install"))


def test_an_output_dir_that_holds_something_is_refused_and_kept(refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("unsaved")
    for resume in ("none", "auto"):
        refused(
            f"resume={resume}",
            output_dir=tmp_path / "mine",
            says=(f"output_dir={tmp_path / 'mine'}", "not empty", "new folder"),
        )


def test_an_output_dir_that_is_a_file_or_below_one_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(output_dir=tmp_path / "file", says=(f"output_dir={tmp_path / 'file'}", "a file", "new folder"))
    refused(
        output_dir=tmp_path / "file" / "run",
        says=(f"output_dir={tmp_path / 'file' / 'run'}", "cannot be made", "give a folder"),
    )


def test_a_teacher_cache_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused(f"teacher.cache={tmp_path / 'file'}", says=("teacher.cache=", "is a file", "give a folder"))


# ---------------------------------------------------------------------- where the message goes


@pytest.mark.parametrize(("message", "shown"), [("iteration 3: the loss is nan", True), ("seed=-1", False)])
def test_other_ranks_show_only_what_may_be_theirs_alone(monkeypatch, capsys, message, shown):
    def fail(config):
        raise engine.EngineError(message)

    monkeypatch.setattr("engine.distillation.distill", fail)
    monkeypatch.setenv("RANK", "1")
    assert engine.train.main([]) == 2
    assert capsys.readouterr().err == (f"error: {message}\n" if shown else "")


def test_the_launcher_fails_with_the_message_on_stderr(tmp_path):
    launcher = Path(sys.executable).parent / "deepspeed"
    script = Path(engine.__file__).parent / "train.py"
    arguments = [f"output_dir={tmp_path / 'out'}", "teacher.path=/no/where"]
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    result = subprocess.run(
        [launcher, f"--master_port={port}", script, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert all(part in errors[0] for part in ("teacher.path", "/no/where", "diffusers format")), errors[0]
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []
