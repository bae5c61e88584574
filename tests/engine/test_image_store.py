"""Images on disk belong to their settings, come back bit for bit, and what is not whole is not there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine import EngineError
from engine.image_store import ImageStore, image_batches, image_files, to_uint8

SETTINGS = {"weights": "abc", "steps": 4, "guidance": 7.5, "shape": (4, 8, 8)}


def picture(channels: int = 3, seed: int = 0, size: tuple[int, int] = (6, 5)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, *size), generator=generator, dtype=torch.uint8)


def pngs(store: ImageStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.suffix == ".png")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_bit_for_bit(tmp_path, channels):
    images = [picture(channels, seed) for seed in range(3)]
    store = ImageStore(tmp_path, SETTINGS)
    for index, image in enumerate(images):
        store.write(index, image)
    again = ImageStore(tmp_path, dict(reversed(SETTINGS.items())))
    assert all(torch.equal(again.read(index), image) for index, image in enumerate(images))
    assert pngs(store) == ["000000.png", "000001.png", "000002.png"]
    seen = np.array(Image.open(store.folder / "000001.png"))
    assert np.array_equal(seen, images[1].permute(1, 2, 0).numpy().squeeze())  # as any other program sees them


@pytest.mark.parametrize(
    "change", [{"weights": "abd"}, {"steps": 5}, {"guidance": 7.0}, {"shape": (4, 8, 9)}, {"x": 1}]
)
def test_other_settings_are_another_folder(tmp_path, change):
    first, second = ImageStore(tmp_path, SETTINGS), ImageStore(tmp_path, {**SETTINGS, **change})
    first.write(0, picture())
    assert second.read(0) is None
    assert first.folder != second.folder


def test_the_manifest_says_what_the_images_are_of(tmp_path):
    store = ImageStore(tmp_path, SETTINGS)
    assert json.loads((store.folder / "manifest.json").read_text()) == {**SETTINGS, "shape": [4, 8, 8]}
    assert pngs(store) == []


def test_images_without_a_manifest_or_with_that_of_others_are_never_taken(tmp_path):
    store = ImageStore(tmp_path, SETTINGS)
    store.write(0, picture())
    (store.folder / "manifest.json").write_text('{"weights": "others"}\n')
    with pytest.raises(EngineError, match=r"manifest\.json is not of the settings"):
        ImageStore(tmp_path, SETTINGS)
    (store.folder / "manifest.json").unlink()
    with pytest.raises(EngineError, match=r"has images and no manifest\.json, so nothing says what drew them"):
        ImageStore(tmp_path, SETTINGS)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("hello")


def flipped(path):
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, empty, text, flipped, lambda path: path.unlink()])
def test_a_damaged_image_is_not_there(tmp_path, damage):
    store = ImageStore(tmp_path, SETTINGS)
    for index in range(2):
        store.write(index, picture(seed=index))
    damage(store.folder / "000001.png")
    assert store.read(1) is None
    assert store.read(0) is not None
    store.write(1, picture(seed=1))
    assert torch.equal(store.read(1), picture(seed=1))


def test_what_a_killed_writer_left_is_no_image(tmp_path):
    store = ImageStore(tmp_path, SETTINGS)
    (store.folder / ".000000.png.77.unfinished").write_bytes(b"half")
    assert ImageStore(tmp_path, SETTINGS).read(0) is None


def test_eight_bits_are_rounded_to_the_nearest():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.4 / 255, 254.6 / 255, 1.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 1, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every / 255), every)


# ---------------------------------------------------------------------- a folder of the user's images


def test_a_folder_is_read_in_order_in_batches_of_one_size(tmp_path):
    sizes = [(4, 4), (4, 4), (4, 4), (5, 4), (4, 4)]
    (tmp_path / "below").mkdir()
    for number, (size, seed) in enumerate(zip(sizes, range(5), strict=True)):
        folder = tmp_path if number < 4 else tmp_path / "below"
        Image.fromarray(picture(3, seed, size).permute(1, 2, 0).numpy()).save(folder / f"{'abcde'[number]}.PNG")
    (tmp_path / "notes.txt").write_text("no image")
    files = image_files(tmp_path)
    assert [path.name for path in files] == ["a.PNG", "b.PNG", "e.PNG", "c.PNG", "d.PNG"]
    batches = list(image_batches(files, gray=False, batch_size=2))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 4, 4), (2, 3, 4, 4), (1, 3, 5, 4)]
    assert torch.equal(batches[0][1], picture(3, 1, (4, 4)))


def test_gray_and_transparent_files_become_what_is_asked_for(tmp_path):
    Image.fromarray(picture(1)[0].numpy()).save(tmp_path / "a.png")
    Image.fromarray(picture(3).permute(1, 2, 0).numpy()).convert("RGBA").save(tmp_path / "b.png")
    colour = [batch[0] for batch in image_batches(image_files(tmp_path), gray=False, batch_size=1)]
    assert torch.equal(colour[0], picture(1).expand(3, -1, -1))
    assert torch.equal(colour[1], picture(3))
    assert [tuple(b.shape) for b in image_batches(image_files(tmp_path), gray=True, batch_size=2)] == [(2, 1, 6, 5)]


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(EngineError, match=r"a\.jpg is not an image: .*; remove or replace it"):
        list(image_batches(image_files(tmp_path), gray=False, batch_size=1))
    with pytest.raises(EngineError, match="none is not a folder"):
        image_files(tmp_path / "none")
