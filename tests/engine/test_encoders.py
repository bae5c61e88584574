"""Evaluation encoders: FID's Inception against figures of torch-fidelity's, CLIP and DINO against transformers' own."""

import json
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from engine import EngineError, load_config, ranks
from engine.encoders import PooledPixels, load_encoders
from engine.image_store import image_batches, image_files
from engine.inception import InceptionV3, load_inception, resize_as_tensorflow_1
from engine.roles import load_teacher
from engine.sources import encode_prompts, load_sources

CPU = torch.device("cpu")
VIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
PROMPTS = ["a cat", "two dogs", "a cat", "a house by the sea"]


def pictures(count: int, *size: int, channels: int = 3, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, *size), generator=generator, dtype=torch.uint8)


# ---------------------------------------------------------------------- Inception


def inception_weights() -> dict[str, torch.Tensor]:
    """Seeded weights under the names of the published file, of a size that keeps the activations near 1."""
    generator, state = torch.Generator().manual_seed(0), {}
    for name, value in sorted(InceptionV3().state_dict().items()):
        if name.endswith("num_batches_tracked"):  # the published file has none
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() == 4:
            state[name] = noise * (2 / value[0].numel()) ** 0.5
        else:
            state[name] = float(name.endswith(("running_var", "bn.weight"))) + 0.1 * noise.clamp(-3, 3)
    return {**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(inception_weights(), path)
    return path


def test_inception_gives_the_features_of_torch_fidelity(inception_file):
    """The figures are those that torch-fidelity 0.4.0's FeatureExtractorInceptionV3 gave for these weights and images,
    which equalled ours bit for bit."""
    features = load_inception(inception_file)(pictures(2, 40, 56))
    assert features.shape == (2, 2048)
    theirs = [
        [1.9137847, 0.0212641, 0.4443265, 1.1994611, 0.4114425, 0.5130104, 1.0341425, 0.8268881],
        [1.8891168, 0.0172302, 0.4519985, 1.1971598, 0.3963815, 0.5156333, 1.0627191, 0.8381172],
    ]
    torch.testing.assert_close(features[:, ::256], torch.tensor(theirs), rtol=1e-4, atol=1e-4)
    assert features.double().mean(1).tolist() == pytest.approx([0.42121440, 0.42074697], rel=1e-4)
    assert features.double().std(1).tolist() == pytest.approx([0.55352846, 0.55235622], rel=1e-4)


def test_inception_has_the_parameters_of_the_published_network():
    network = InceptionV3()
    assert sum(parameter.numel() for parameter in network.parameters()) == 21_785_568
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert shapes["Mixed_6a.branch3x3dbl_3.bn.running_var"] == (96,)
    assert shapes["Mixed_6e.branch7x7dbl_5.conv.weight"] == (192, 192, 1, 7)
    assert shapes["Mixed_7a.branch7x7x3_4.conv.weight"] == (192, 192, 3, 3)
    assert shapes["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert shapes["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)


def test_the_resize_is_that_of_tensorflow_1():
    ramp = torch.arange(4.0).expand(1, 1, 2, 4)  # output i lies at i * 4/8: no half-pixel shift, the last repeated
    assert resize_as_tensorflow_1(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    down = torch.arange(10.0).expand(1, 1, 10, 10)  # no antialiasing: points at 0, 2.5, 5, 7.5
    assert resize_as_tensorflow_1(down, 4)[0, 0, 2].tolist() == [0, 2.5, 5, 7.5]
    assert resize_as_tensorflow_1(down.mT, 4)[0, 0, :, 1].tolist() == [0, 2.5, 5, 7.5]
    same = pictures(1, 5, 5).float()
    assert torch.equal(resize_as_tensorflow_1(same, 5), same)


def test_inception_takes_gray_images_any_size_and_any_batch(inception_file):
    settings = {"fid": {"kind": "inception", "path": str(inception_file), "batch_size": 2}}
    encode = load_encoders(settings, CPU, text=False)["fid"]
    gray = pictures(3, 20, 30, channels=1)
    features = encode(gray)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(encode(gray.expand(-1, 3, -1, -1)[2:]), features[2:], rtol=1e-4, atol=1e-5)
    assert not encode.reads_text


def without(*names):
    return lambda state: {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without("Mixed_7c.branch_pool.bn.bias"), r"1 of \d+ weights are missing .*, first Mixed_7c\.branch_pool\.bn"),
        (lambda s: {**s, "Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}, r"first Conv2d_1a_3x3\.conv\.weight"),
        (lambda s: {**s, "fc.weight": torch.zeros(1000, 2048)}, r"1000 classes and FID's 1008: it is torchvision's"),
        (lambda s: list(s.values()), r"holds no mapping of names to tensors"),
        (lambda s: {"model": s}, r"holds no mapping of names to tensors"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, change, expected):
    torch.save(change(inception_weights()), tmp_path / "weights.pth")
    with pytest.raises(EngineError, match=rf"evaluation\.encoders\.fid\.path=.*weights\.pth: .*{expected}"):
        load_encoders({"fid": {"kind": "inception", "path": str(tmp_path / "weights.pth")}}, CPU, text=False)


def test_a_file_of_weights_that_is_missing_or_cut_is_refused(tmp_path, inception_file):
    def load():
        load_encoders({"fid": {"kind": "inception", "path": str(tmp_path / "a.pth")}}, CPU, text=False)

    with pytest.raises(
        EngineError, match=r"encoders\.fid\.path=.*a\.pth: there is no such file; weights-inception-2015"
    ):
        load()
    (tmp_path / "a.pth").write_bytes(inception_file.read_bytes()[:-1000])
    with pytest.raises(EngineError, match=r"encoders\.fid\.path=.*a\.pth: it cannot be read"):
        load()


# ---------------------------------------------------------------------- CLIP and DINO


def saved(model, processor, folder: Path) -> Path:
    """A model, its weights large enough to tell images apart, and its processor, as they are published."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter[0].numel() ** 0.5, generator=generator)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    words = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    special = {"bos_token_id": words["<|startoftext|>"], "eos_token_id": words["<|endoftext|>"], "pad_token_id": 0}
    text = {**VIT, **special, "vocab_size": len(words), "max_position_embeddings": 24}
    config = CLIPConfig(text_config=text, vision_config=VIT, projection_dim=12)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return saved(CLIPModel(config).eval(), processor, folder)


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory) -> Path:
    from transformers import AutoModel, BitImageProcessor, Dinov2Config

    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return saved(AutoModel.from_config(Dinov2Config(**VIT)).eval(), processor, tmp_path_factory.mktemp("dino"))


def processed(folder: Path, images: torch.Tensor) -> torch.Tensor:
    from transformers import AutoImageProcessor

    files = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    return AutoImageProcessor.from_pretrained(folder)(files, return_tensors="pt").pixel_values


@pytest.mark.parametrize("size", [(28, 28), (40, 33)])
def test_dino_gives_the_class_token_of_transformers(dino_folder, size):
    from transformers import AutoModel

    images = pictures(5, *size)
    settings = {"dino": {"kind": "dino", "path": str(dino_folder), "batch_size": 2}}
    ours = load_encoders(settings, CPU, text=True)["dino"]
    model = AutoModel.from_pretrained(dino_folder)
    with torch.no_grad():
        expected = model(pixel_values=processed(dino_folder, images)).last_hidden_state[:, 0]
    exact = size == (28, 28)  # a resize of 8-bit images rounds, ours does not
    torch.testing.assert_close(ours(images), expected, rtol=0, atol=1e-5 if exact else 0.1)
    assert not ours.reads_text


def test_the_cosine_of_clips_features_is_what_its_logits_are_made_of(clip_folder):
    from transformers import AutoTokenizer, CLIPModel

    images = pictures(4, 28, 28)
    encode = load_encoders({"clip": {"kind": "clip", "path": str(clip_folder)}}, CPU, text=True)["clip"]
    cosines = F.cosine_similarity(encode(images)[:, None], encode.embed(PROMPTS)[None], dim=2)
    model = CLIPModel.from_pretrained(clip_folder)
    tokens = AutoTokenizer.from_pretrained(clip_folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=processed(clip_folder, images), **tokens)
        torch.testing.assert_close(cosines, output.logits_per_image / model.logit_scale.exp(), rtol=0, atol=1e-5)
    assert cosines.std() > 0.05, "all cosines are alike, so nothing was shown"


def test_clip_without_prompts_keeps_no_text_tower(clip_folder):
    encode = load_encoders({"clip": {"kind": "clip", "path": str(clip_folder)}}, CPU, text=False)["clip"]
    assert not encode.reads_text
    assert encode(pictures(2, 28, 28)).shape == (2, 12)
    assert not any("text" in name for name, _ in encode.model.network.named_parameters())


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_features_of_bf16_encoders_are_fp32_and_near(clip_folder, dino_folder, kind):
    folder = {"clip": clip_folder, "dino": dino_folder}[kind]
    settings = {p: {"kind": kind, "path": str(folder), "precision": p} for p in ("fp32", "bf16")}
    encoders = load_encoders(settings, CPU, text=False)
    exact, rounded = (encoders[precision](pictures(3, 28, 28)) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_pooled_pixels_are_the_means_of_an_8x8_grid():
    images = pictures(2, 16, 24)
    expected = images.double().numpy().reshape(2, 3, 8, 2, 8, 3).mean((3, 5)).reshape(2, -1) / 255
    np.testing.assert_allclose(PooledPixels()(images).numpy(), expected, rtol=1e-5)
    assert PooledPixels()(pictures(2, 4, 6, channels=1)).shape == (2, 24)


# ---------------------------------------------------------------------- in an evaluation


@pytest.mark.filterwarnings("ignore:.*the sampler takes the steps of a DDIMScheduler")
def test_rows_hold_the_figures_of_each_encoder_and_the_first_ones_at_the_top(
    tiny_pipeline, clip_folder, dino_folder, tmp_path
):
    from engine.evaluate import Evaluator

    (tmp_path / "prompts.txt").write_text("".join(f"a cat and {n} dogs\n" for n in range(40)))
    encoders = {"dino": {"kind": "dino", "path": str(dino_folder)}, "words": {"kind": "clip", "path": str(clip_folder)}}
    config = load_config(
        {
            "teacher": {"path": str(tiny_pipeline("sd")), "resolution": [16, 16], "steps": 2},
            "student": {"steps": 2},
            "prompts": {"path": str(tmp_path / "prompts.txt"), "held_out": 0.5},
            "evaluation": {"samples": 100, "encoders": encoders, "store": str(tmp_path / "store")},
        }
    )
    ranks.start(1)
    pipeline = load_teacher(config)
    sources = load_sources(config, pipeline, tmp_path)
    encode_prompts(config, sources, pipeline)
    evaluator = Evaluator(config, pipeline, CPU, sources["evaluation"], weights="w")
    row = evaluator.row(pipeline.denoiser, 1, guidance=2.0).metrics
    assert list(row["encoders"]) == ["dino", "words"]
    assert {key: row[key] for key in row["encoders"]["dino"]} == row["encoders"]["dino"]

    stores = {path.parent for path in (tmp_path / "store").rglob("*.png")}
    (store,) = (folder for folder in stores if json.loads((folder / "manifest.json").read_text())["steps"] == 1)
    images = torch.stack(list(image_batches(image_files(store), gray=False, batch_size=100)))[0]
    judge = load_encoders(encoders, CPU, text=True)
    asked = evaluator._pool.asked(torch.arange(100))["prompt"]
    cosine = F.cosine_similarity(judge["words"](images), judge["words"].embed(asked)).mean().item()
    assert row["clip_score"] == row["encoders"]["words"]["clip_score"] == pytest.approx(cosine, abs=1e-6)
    assert row["clip_score_01"] == pytest.approx((cosine + 1) / 2, abs=1e-6)
    assert "clip_score" not in row["encoders"]["dino"]
    assert row["encoders"]["words"]["fd"] != row["encoders"]["dino"]["fd"]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"path": "x"}, r"evaluation\.encoders\.one\.kind: field required; an encoder has kind, path, batch_size"),
        (
            {"kind": "vgg", "path": "x"},
            r"evaluation\.encoders\.one\.kind: input should be 'inception', 'dino' or 'clip'",
        ),
        ({"kind": "clip"}, r"evaluation\.encoders\.one\.path: field required"),
        ({"kind": "clip", "path": "x", "batchsize": 2}, r"evaluation\.encoders\.one\.batchsize: extra inputs are not"),
        (
            {"kind": "clip", "path": "x", "batch_size": 0},
            r"evaluation\.encoders\.one\.batch_size: input should be great",
        ),
        ({"kind": "inception", "path": "x", "precision": "bf16"}, r"one\.precision=bf16: figures of Inception are def"),
        (
            {"kind": "clip", "path": "/no/where"},
            r"evaluation\.encoders\.one\.path=/no/where: .*a directory in transformers format",
        ),
    ],
)
def test_an_encoder_that_cannot_be_is_refused_by_its_key(entry, expected):
    with pytest.raises(EngineError, match=expected):
        load_encoders({"one": entry}, CPU, text=False)


def test_a_model_of_another_kind_is_refused(clip_folder, dino_folder):
    with pytest.raises(
        EngineError, match=r"evaluation\.encoders\.a\.path=.*: it holds a model of type 'dinov2'; one of cl"
    ):
        load_encoders({"a": {"kind": "clip", "path": str(dino_folder)}}, CPU, text=True)
    with pytest.raises(EngineError, match=r"it holds a model of type 'clip'; one of dinov2"):
        load_encoders({"a": {"kind": "dino", "path": str(clip_folder)}}, CPU, text=True)
