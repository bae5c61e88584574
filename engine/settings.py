"""The configuration's schema: every key, its default, its meaning and what it accepts.

What a value may be on its own is checked here, what depends on the machine or the teacher at start, before anything is
written (`engine.preflight`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.objectives.settings import Objective
from engine.section import NonNegative, Positive, Section, Weight


class Teacher(Section):
    path: str = "digits"
    """"digits" (the embedded teacher) or a directory in diffusers format (docs/families.md)."""
    resolution: tuple[Positive, Positive] | None = None
    """Height and width of the images in pixels. None: what the directory's network was trained for."""
    precision: Literal["fp32", "bf16", "fp16", "int8", "nf4"] = "fp32"
    """Of the frozen weights: of the teacher, and with LoRA of the one network under the adapters. "int8" and "nf4"
    quantise by bitsandbytes."""
    steps: Positive = 50
    """Deterministic steps that draw the target images."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance weight of the target images; 1 is without guidance."""
    cache: str | None = None
    """Folder of cached target images, shared between runs; by default the run's own `teacher_cache`."""


class Student(Section):
    steps: Positive = 5
    """Steps of the student: what it is distilled to, in training and evaluation alike."""
    sampler: Literal["ode", "renoise"] = "ode"
    """What it draws with: "ode" (the deterministic sampler of its teacher) or "renoise" (multi-step consistency
    sampling: the image that it predicts, with fresh noise at the next level), for students of consistency distillation
    and distribution matching. Exports have the scheduler of it: LCM, or for a flow stochastic Euler steps."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Guidance weight in rollout, update and evaluation alike."""
    init: str = "teacher"
    """"teacher" (a copy of its weights) or a directory with a student, as an earlier run exports it."""
    architecture: dict[str, Any] = {}
    """Entries of the network's config.json that differ from the teacher's, for a smaller student; weights whose name
    and shape agree are copied, the others are drawn. Such a student needs cloning.iterations."""
    trainable: str | None = None
    """Regular expression of the names of the parameters to train; the others stay as they are. None: all."""


class Lora(Section):
    rank: NonNegative = 0
    """Rank of low-rank adapters, trained in place of the weights; one network is then teacher, reference and student.
    0: train the weights themselves."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The adapters' product is scaled by alpha / rank. None: by 1."""
    target: str | None = None
    """Regular expression of the names of the linear layers that get adapters. None: the attention's projections."""


class Cloning(Section):
    iterations: NonNegative = 0
    """Optimizer steps of behaviour cloning before the first rollout: regression on the teacher's predictions along its
    own trajectories of student.steps. For students of another architecture."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate, falling to 0 as a cosine."""


class Model(Section):
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    """Operator of attention. "auto": xformers where it has one for the device and precision, PyTorch's elsewhere."""
    gradient_checkpointing: bool = False
    """Keep the input of each block only, and compute the rest again in the backward pass."""
    channels_last: bool = False
    """Convolutions of UNets in the memory format that tensor cores read."""
    compile: bool = False
    """torch.compile the blocks that a network repeats, for rollout and update alike."""
    fused_kernels: Literal["auto", "on", "off"] = "auto"
    """Run the norms, gates and GEGLUs of teacher and student on our kernels (`engine.kernels.patch`). "auto": on a GPU;
    "on": on any device, by the slower PyTorch reference on a CPU; "off": not at all."""

    @field_validator("fused_kernels", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        # YAML 1.1 reads the bare words on and off as true and false
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class Vae(Section):
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the decoder's weights; that of Stable Diffusion XL overflows in fp16."""
    batch_size: Positive | None = None
    """Most latents in one pass of the decoder. None: rollout.batch_size."""
    slicing: bool = False
    """Decode one latent at a time."""
    tiling: bool = False
    """Decode large latents in overlapping tiles, which changes the image slightly."""


class Policy(Section):
    kind: Literal["ddim", "flow_sde", "dance_sde", "cps", "edm_ancestral", "renoise"] = "ddim"
    """Sampler whose noise is trained on: "ddim" for diffusion teachers; "flow_sde" (Flow-GRPO), "dance_sde" (DanceGRPO)
    or "cps" for flow matching; "renoise" for students of student.sampler=renoise."""
    eta: Annotated[float, Field(gt=0)] = 0.5
    """Noise of the sampler during training: DDIM's eta, the SDE's noise level, of "renoise" the share of the next
    level's noise that is fresh. Evaluation is at 0, and of a renoising student at 1."""
    window: Positive | None = 1
    """Number of consecutive steps that are stochastic in one iteration, at a place that changes from iteration to
    iteration; the other steps are deterministic and, before the window, computed once per group. With one
    step a sample's reward differs by nothing but that step's noise, at 40 % of the passes. None: all steps."""


class Rollout(Section):
    conditions: Positive = 64
    """Conditions per iteration, over all ranks; a multiple of their number (a group stays on one rank)."""
    group_size: Positive = 8
    """Samples of each condition."""
    pairing: Literal["noise", "prompt"] = "noise"
    """"noise": the group starts from the teacher's initial noise. "prompt": each sample from its own."""
    pool: Positive = 1024
    """Size of the fixed pool of training conditions; the teacher draws each of them once."""
    batch_size: Positive | None = None
    """Most samples in one forward pass of rollout, teacher and evaluation. None: all at once."""
    chunks: Positive = 1
    """Parts that an iteration's conditions are rolled out in; a part is decoded and scored while the next is rolled
    out, so a slow reward costs no time of the GPU."""


class Prompts(Section):
    path: str | None = None
    """Prompts of a text-conditional teacher: text (one a line), JSONL, COCO captions JSON, CSV or Parquet."""
    column: str | None = None
    """Key or column of the prompt in JSONL, CSV and Parquet. None: prompt, caption or text, whichever there is."""
    negative: str = ""
    """What guidance leads away from, where a row gives no negative prompt of its own."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the prompts that are never trained on, chosen by a hash of their text: one half choose the best
    checkpoint, the other judge the result."""
    cache: str | None = None
    """Folder of encoded prompts, shared between runs; by default the run's own `prompt_cache`."""
    batch_size: Positive = 16
    """Prompts in one pass of the text encoders."""


class Reward(Section):
    terms: dict[str, float | dict[str, Any]] = {"feature": 1.0}
    """The reward's terms, each a weight or a mapping with `weight` and its own keys (docs/rewards.md). For digits:
    "feature" (cosine of encoder features with the teacher's image), "class_log_prob" (log-probability of the asked
    class); for any teacher "pixel" (negative mean squared error), "clip", "clip_text", "dino" and others."""
    standardize: bool = False
    """Bring each term to mean 0 and deviation 1, by its running statistics over the run, before it is weighted."""


class Advantage(Section):
    scale: Literal["group_std", "global_std", "none"] = "group_std"
    """What a reward's deviation is divided by; "none" with objective.kind=grpo is Dr.GRPO. For ppo, which has
    no groups, group_std is global_std: that of the iteration's rewards."""
    clip: Annotated[float, Field(gt=0)] | None = 5.0
    """Largest magnitude of an advantage; None: as it is."""


class Optimizer(Section):
    kind: Literal["adamw", "adamw8bit", "paged_adamw8bit", "lion", "lion8bit", "paged_lion8bit"] = "adamw"
    """"adamw" (torch), the others of bitsandbytes: 8-bit states; "paged" moves them to host memory when the GPU's is
    short; lion keeps one state instead of two and wants a learning rate 3 to 10 times smaller."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Learning rate at the start."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay of the running means of the gradient and of its square."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second mean."""
    weight_decay: Weight = 0.0
    """Decoupled from the gradient."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm, over all parameters and ranks."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How lr goes from its value to lr * final_lr over the iterations."""
    final_lr: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Last learning rate as a share of lr; read by the linear and cosine schedules."""


class Ema(Section):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Per iteration; the averaged student is the one evaluated and exported. 0: the student itself."""


class Train(Section):
    micro_batch: Positive = 512
    """Most examples in one forward and backward pass of a rank: (sample, step) pairs of a rollout, or states of a
    distillation; accumulation follows from it."""
    batch_size: Positive = 512
    """Examples in an optimizer step of a distillation, over all ranks; a rollout has its own number."""
    inner_epochs: Positive = 1
    """Passes over the (sample, step) pairs of a rollout. The student takes inner_epochs * updates optimizer steps in an
    iteration, whatever the objective."""
    updates: Positive = 1
    """Optimizer steps of the student per inner epoch. With one update and one epoch every step of a policy gradient is
    on-policy and never clipped."""
    ratio_tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest |ratio - 1| before the first update of an iteration; beyond it training stops. None: in fp32 what
    rounding explains, 1e-6 of the largest |b| / std of a step and at least 1e-5; 0.05 in bf16 and fp16."""
    threads: Positive | None = None
    """CPU threads of each rank. None: the machine's cores over its ranks."""


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed partitions over ranks: 1 optimizer states, 2 gradients too, 3 parameters too; 0: nothing."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """Keep optimizer states (stage 1-3), or parameters too (stage 3), in CPU memory."""
    master_weights: Literal["fp32", "bf16"] = "fp32"
    """Of the weights and gradients that the optimizer works on when precision is not fp32; bf16 halves them and loses
    updates below 1/256 of a weight."""
    deepspeed: dict[str, Any] = {}
    """Extra DeepSpeed configuration, passed through untouched; may not set what other keys decide."""

    @model_validator(mode="after")
    def _offload_needs_partitions(self) -> Zero:
        least = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.stage < least:
            raise ValueError(f"zero.offload={self.offload} needs zero.stage >= {least}, got zero.stage={self.stage}")
        return self


class Evaluation(Section):
    every: NonNegative = 10
    """Iterations between eta = 0 rewards on held-out conditions, which choose the best checkpoint; 0: never."""
    held_out: Positive = 256
    """Number of those conditions."""
    samples: Positive = 2000
    """Images per row of the final evaluation, on conditions of their own; at least 1000 for figures worth quoting."""
    seed: int = 123
    """Seed of the held-out conditions: the same for every training seed."""
    encoders: dict[str, dict[str, Any]] = {}
    """Encoders that judge the images of a teacher other than digits: name -> {kind: inception | dino | clip, path: ...}
    (docs/evaluation.md); the first one gives `fd`. None: pixels pooled to 8x8."""
    real_images: str | None = None
    """Folder of real images to measure distances to. None: the teacher's images of other conditions."""
    dpm: bool = False
    """Also evaluate the teacher at the student's steps with DPM-Solver++."""
    seeds_per_prompt: Positive = 1
    """Images of each evaluated condition, from noise of their own; with 2 or more their diversity is measured."""
    store: str | None = None
    """Folder for the images of the evaluation, one sub-folder for each weights and settings. None: not kept."""

    @field_validator("samples")
    @classmethod
    def _enough_for_a_covariance(cls, samples: int) -> int:
        if samples < 100:
            raise ValueError(
                f"evaluation.samples={samples} cannot estimate a Frechet distance of 64 features; give at least 100"
            )
        return samples


class Checkpoint(Section):
    every: NonNegative = 20
    """Iterations between checkpoints; the last iteration is always one. 0: the last only."""
    keep: Positive = 2
    """Checkpoints that stay; the best student stays besides."""


class Logging(Section):
    tensorboard: bool = True
    """Write `tensorboard/` in the run directory."""
    wandb: bool = False
    """Also log to Weights & Biases; needs the extra `wandb`."""


class Config(Section):
    """The whole configuration of a run; immutable."""

    output_dir: str | None = None
    """Run directory; must not hold a run yet, unless it is resumed. None: a new folder below `runs/`."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the training conditions, their noise and the order of updates."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the student in rollout and update; the optimizer keeps fp32 weights."""
    iterations: Positive = 50
    """Rollouts to train on; a resumed run goes on up to this number."""
    resume: str = "none"
    """"none", "auto" (the newest checkpoint in output_dir, if there is one) or the path of a run or a checkpoint."""
    teacher: Teacher = Teacher()
    student: Student = Student()
    lora: Lora = Lora()
    cloning: Cloning = Cloning()
    model: Model = Model()
    vae: Vae = Vae()
    policy: Policy = Policy()
    rollout: Rollout = Rollout()
    prompts: Prompts = Prompts()
    reward: Reward = Reward()
    advantage: Advantage = Advantage()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    ema: Ema = Ema()
    train: Train = Train()
    zero: Zero = Zero()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @model_validator(mode="after")
    def _sizes_fit(self) -> Config:
        if self.student.architecture and not self.cloning.iterations:
            raise ValueError(
                f"student.architecture={self.student.architecture} with cloning.iterations=0 starts from random "
                "weights, which no reward tells apart; give cloning.iterations, such as 1000"
            )
        if self.rollout.chunks > self.rollout.conditions:
            raise ValueError(
                f"rollout.chunks={self.rollout.chunks} is more than rollout.conditions={self.rollout.conditions}; "
                "a part holds at least one condition"
            )
        if self.rollout.conditions > self.rollout.pool:
            raise ValueError(
                f"rollout.conditions={self.rollout.conditions} is more than rollout.pool={self.rollout.pool}; "
                "an iteration draws its conditions without repetition"
            )
        if "grpo" in self.objective.kinds and self.rollout.group_size < 2:
            raise ValueError(
                f"rollout.group_size={self.rollout.group_size} leaves every GRPO advantage at 0; "
                "give at least 2, or use objective.kind=ppo"
            )
        if self.student.steps > self.teacher.steps:
            raise ValueError(
                f"student.steps={self.student.steps} is more than teacher.steps={self.teacher.steps}; "
                "a student has at most its teacher's steps"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain mapping of all keys, as written to `config.yaml`."""
        return self.model_dump(mode="json")
