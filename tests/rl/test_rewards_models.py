"""Rewards through models of local directories, against transformers' own processor and model in plain float64."""

import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ConvNextConfig,
    DINOv3ViTConfig,
)

from engine.rl.rewards import RewardError, make_reward

VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
CONVNET = {"depths": [1, 1], "hidden_sizes": [8, 16]}
DINOS = {
    "dinov2": Dinov2Config(**VIT),
    "dinov2_with_registers": Dinov2WithRegistersConfig(**VIT, num_register_tokens=3),
    "dinov3_vit": DINOv3ViTConfig(**VIT, num_register_tokens=4),
    "dinov3_convnext": DINOv3ConvNextConfig(**CONVNET),
}
PROMPTS = ["a dog", "two cats", "a dog", "a very long prompt that is cut"]
MODEL_KINDS = ["clip", "clip_text", "pickscore", "hps", "aesthetic", "dino", "perceptual"]


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file of each published layout of aesthetic heads, for 12 features, and the float64 function of each."""
    folder, generator = tmp_path_factory.mktemp("heads"), torch.Generator().manual_seed(3)

    def linear(inputs, outputs):
        return torch.randn(outputs, inputs, generator=generator) / 3, torch.randn(outputs, generator=generator)

    single = linear(12, 1)
    save_file({"weight": single[0], "bias": single[1]}, folder / "linear.safetensors")
    chain = [linear(*sizes) for sizes in ((12, 8), (8, 6), (6, 5), (5, 4), (4, 1))]
    named = zip((0, 2, 4, 6, 7), chain, strict=True)
    tensors = {f"layers.{n}.{part}": t for n, pair in named for part, t in zip(("weight", "bias"), pair, strict=True)}
    torch.save(tensors, folder / "mlp.pth")

    def apply(layers):
        def score(x):
            for weight, bias in layers:
                x = x @ weight.double().T + bias.double()
            return x[:, 0]

        return score

    return {folder / "linear.safetensors": apply([single]), folder / "mlp.pth": apply(chain)}


@pytest.fixture(scope="module")
def settings(clip, vision, heads):
    """Settings of one term of each kind that looks through a model."""
    dino = str(vision(DINOS["dinov2"]))
    terms = {kind: {"path": str(clip)} for kind in MODEL_KINDS}
    terms["aesthetic"]["head"] = str(next(iter(heads)))
    terms["dino"]["path"] = terms["perceptual"]["path"] = dino
    terms["perceptual"]["layers"] = [0, 2]
    return terms


def pixels(count, size=(28, 28), seed=0):
    """uint8 images with shapes in them, (count, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    return (nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1) * 255).round().byte()


def stock(folder, images, processor=CLIPImageProcessor):
    """transformers' processor on uint8 images and its model on the result in float64."""
    values = processor.from_pretrained(folder)([x.permute(1, 2, 0).numpy() for x in images], return_tensors="pt")
    model = AutoModel.from_pretrained(folder).double().eval()
    return SimpleNamespace(model=model, pixel_values=values.pixel_values.double())


def embeddings(folder, images):
    made = stock(folder, images)
    return made.model.visual_projection(made.model.vision_model(pixel_values=made.pixel_values).pooler_output)


def cos(a, b):
    return (a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt())


def score(terms, images, targets, asked=(), **options):
    reward = make_reward(terms, device="cpu", **options)
    return reward(images / 255, targets / 255, dict(asked))[1]


def close(ours, expected, atol=2e-5):
    assert expected.std() > max(5 * atol, 1e-2), "the inputs tell nothing apart"
    torch.testing.assert_close(ours.double(), expected, atol=atol, rtol=atol)


# Each kind against transformers


@pytest.mark.parametrize(("size", "atol"), [((28, 28), 2e-5), ((50, 40), 2e-2)], ids=["as it is", "resized"])
def test_clip_is_the_cosine_of_the_image_embeddings(clip, size, atol):
    images, targets = pixels(6, size), pixels(6, size, seed=1)
    ours = score({"clip": {"path": str(clip)}}, images, targets)["clip"]
    close(ours, cos(embeddings(clip, images), embeddings(clip, targets)), atol)


def test_clip_text_is_the_raw_cosine_and_the_preference_models_scale_it(clip):
    images = pixels(4)
    terms = {name: {"path": str(clip)} for name in ("clip_text", "pickscore", "hps")}
    ours = score(terms, images, images, {"prompt": PROMPTS})
    made = stock(clip, images)
    tokenizer = AutoTokenizer.from_pretrained(clip)
    prompts = [tokenizer([p], truncation=True, max_length=12, return_tensors="pt").input_ids for p in PROMPTS]
    model = made.model.float()  # transformers 4 cannot run the text model in fp64
    texts = [model.text_projection(model.text_model(input_ids=ids).pooler_output)[0].double() for ids in prompts]
    expected = cos(embeddings(clip, images), torch.stack(texts))
    close(ours["clip_text"], expected)
    close(ours["pickscore"], expected * torch.e**3.0, atol=5e-4)
    assert torch.equal(ours["pickscore"], ours["hps"])


@pytest.mark.parametrize("tokens", ["cls", "patch"])
@pytest.mark.parametrize("name", DINOS)
def test_dino_compares_class_tokens_or_patches_at_the_same_place(vision, name, tokens):
    config = DINOS[name]
    folder, images, targets = vision(config), pixels(5), pixels(5, seed=1)
    ours = score({"dino": {"path": str(folder), "tokens": tokens}}, images, targets)["dino"]
    sides = []
    for side in (images, targets):
        made = stock(folder, side, BitImageProcessor)
        sides.append(made.model(pixel_values=made.pixel_values).last_hidden_state)
    if tokens == "cls":
        close(ours, cos(sides[0][:, 0], sides[1][:, 0]))
    else:
        places = 3 * 3 if "convnext" in name else 4 * 4
        patches = [side[:, -places:] for side in sides]
        assert patches[0].shape[1] == sides[0].shape[1] - 1 - getattr(config, "num_register_tokens", 0)
        close(ours, cos(*patches).mean(1))


@pytest.mark.parametrize("layout", [0, 1], ids=["linear", "mlp"])
def test_aesthetic_is_the_head_on_the_embedding_of_length_one(clip, heads, layout):
    images, (file, head) = pixels(5), list(heads.items())[layout]
    ours = score({"aesthetic": {"path": str(clip), "head": str(file)}}, images, images)["aesthetic"]
    embedded = embeddings(clip, images)
    close(ours, head(embedded / embedded.norm(dim=1, keepdim=True)))


@pytest.mark.parametrize("config", [DINOS["dinov2"], ConvNextConfig(**CONVNET, num_stages=2)], ids=["tokens", "maps"])
def test_perceptual_is_the_distance_of_normalised_hidden_states(vision, config):
    folder, images, targets = vision(config), pixels(5), pixels(5, seed=1)
    ours = score({"perceptual": {"path": str(folder), "layers": [1, 2]}}, images, targets)["perceptual"]
    states = []
    for side in (images, targets):
        made = stock(folder, side, BitImageProcessor)
        states.append(made.model(pixel_values=made.pixel_values, output_hidden_states=True).hidden_states)
    distances = []
    for layer in (1, 2):
        x, y = (s[layer].movedim(1, -1) if s[layer].dim() == 4 else s[layer] for s in states)
        squared = (x / x.norm(dim=-1, keepdim=True) - y / y.norm(dim=-1, keepdim=True)).square().sum(-1)
        distances.append(squared.reshape(5, -1).mean(1))
    close(ours, -(distances[0] + distances[1]) / 2)
    same = score({"perceptual": {"path": str(folder), "layers": [1]}}, images, images)["perceptual"]
    assert same.abs().max() < 1e-10


# What holds for all of them


def test_every_kind_of_model_has_its_gradient(settings):
    images = (pixels(2, (33, 31)) / 255).clamp(0.1, 0.9).requires_grad_()
    targets = pixels(1, (33, 31), seed=1) / 255
    direction, step = torch.randn(images.shape, generator=torch.Generator().manual_seed(4)), 2e-3
    for kind, term in settings.items():
        reward = make_reward({kind: term}, device="cpu")
        assert reward.differentiable
        (gradient,) = torch.autograd.grad(reward(images, targets, {"prompt": PROMPTS[:2]})[0].sum(), images)
        with torch.no_grad():
            moved = [images + sign * step * direction for sign in (1, -1)]
            up, down = (reward(x, targets, {"prompt": PROMPTS[:2]})[0].double().sum() for x in moved)
        slope = float(up - down) / (2 * step)
        assert slope != 0
        assert float((gradient * direction).sum()) == pytest.approx(
            slope, rel=3e-2, abs=2e-3 * float(gradient.norm())
        ), kind


def test_a_target_stands_for_a_group_of_consecutive_images(settings):
    images, targets = pixels(6), pixels(2, seed=1)
    asked = {"prompt": [*PROMPTS, "x", "y"]}
    terms = {**settings, "pixel": 1.0}
    grouped = score(terms, images, targets, asked)
    repeated = score(terms, images, targets.repeat_interleave(3, 0), asked)
    assert grouped.keys() == repeated.keys() == terms.keys()
    for name, values in grouped.items():
        torch.testing.assert_close(values, repeated[name])
        assert values.std() > 0


def test_terms_of_one_directory_run_its_model_once(settings):
    reward = make_reward({**settings, "fast": {**settings["clip"], "kind": "clip", "precision": "bf16"}}, device="cpu")
    assert len(reward.networks) == 3  # CLIP in two precisions, and the DINO that perceptual reads too
    seen = {}
    for number, network in enumerate(reward.networks):
        tower = getattr(network, "vision_model", network)
        count = lambda _, inputs, options, n=number: seen.setdefault(n, []).append(len(options["pixel_values"]))  # noqa: E731
        tower.register_forward_pre_hook(count, with_kwargs=True)
    reward(pixels(6) / 255, pixels(2) / 255, {"prompt": [*PROMPTS, "x", "y"]})
    assert seen == {0: [6, 2], 1: [6, 2], 2: [6, 2]}


def test_a_model_sees_at_most_its_batch_size(settings):
    images, asked = pixels(5), {"prompt": [*PROMPTS, "x"]}
    for kind, term in settings.items():
        whole = score({kind: term}, images, images.flip(0), asked)[kind]
        reward = make_reward({kind: {**term, "batch_size": 2}}, device="cpu")
        tower, seen = getattr(reward.networks[0], "vision_model", reward.networks[0]), []
        tower.register_forward_pre_hook(
            lambda _, __, given, s=seen: s.append(len(given["pixel_values"])), with_kwargs=True
        )
        parts = reward(images / 255, images.flip(0) / 255, asked)[1][kind]
        assert set(seen) == {1, 2}
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_a_shared_model_sees_the_smallest_batch_size_of_its_terms(clip):
    sizes = {f"clip{size}": {"kind": "clip", "path": str(clip), "batch_size": size} for size in (3, 2, 4)}
    reward = make_reward(sizes, device="cpu")
    assert [term.model.batch_size for term in reward.terms.values()] == [2, 2, 2]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_runs_in_its_own_precision(settings, precision):
    images, asked = pixels(4), {"prompt": PROMPTS}
    for kind, term in settings.items():
        exact = score({kind: term}, images, images.flip(0), asked)[kind]
        reward = make_reward({kind: {**term, "precision": precision}}, device="cpu")
        (dtype,) = {parameter.dtype for parameter in reward.networks[0].parameters()}
        assert dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        ours = reward(images / 255, images.flip(0) / 255, asked)[1][kind]
        assert ours.dtype == torch.float32
        assert 0 < (ours - exact).abs().max() < 0.1 * max(1, exact.abs().max()), kind


def test_models_are_frozen_and_keep_only_what_is_read(clip):
    (network,) = make_reward({"clip": {"path": str(clip)}}, device="cpu").networks
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any("text" in name for name, _ in network.named_parameters())


def test_another_thread_gets_the_same_rewards(settings):
    reward = make_reward(settings, device="cpu")
    batches = [(pixels(4, seed=n) / 255, pixels(2, seed=n + 9) / 255, {"prompt": PROMPTS}) for n in range(4)]
    expected, found = [reward(*batch)[1] for batch in batches], {}
    threads = [
        threading.Thread(target=lambda n=n, batch=batch: found.update({n: reward(*batch)[1]}))
        for n, batch in enumerate(batches)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, values in enumerate(expected):
        for name, value in values.items():
            torch.testing.assert_close(found[number][name], value, rtol=1e-5, atol=1e-6)


def test_what_a_term_asks_for_is_known_before_the_first_image(settings):
    reward = make_reward({**settings, "pixel": 1.0}, device="cpu")
    assert {name for name, term in reward.terms.items() if term.asks == "prompt"} == {"clip_text", "pickscore", "hps"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"class_labels": torch.zeros(4)}, r"clip_text needs the prompts that were asked for, got class_labels"),
        ({"prompt": PROMPTS[:3]}, r"clip_text needs 4 prompts, one an image, got 3"),
    ],
)
def test_prompts_that_are_missing_are_refused(clip, asked, message):
    with pytest.raises(RewardError, match=message):
        score({"clip_text": {"path": str(clip)}}, pixels(4), pixels(4), asked)
