"""Frames of any video come by its own clock, upright, and what is none is named."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from unified_mm.data import clips
from unified_mm.data.layouts import LAYOUTS, Folder
from unified_mm.data.manifest import build_manifest, summary
from unified_mm.data.sources import given_folder
from unified_mm.default_config import default_config


def shades(count=20, height=48, width=64):
    """Frames that are told apart by their grey, red in the upper left corner."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[:] = (10 + 10 * np.arange(count))[:, None, None, None]
    frames[:, :16, :16] = (255, 0, 0)
    return frames


def write_npz(path, count=20, fps=10.0):
    np.savez_compressed(path, frames=shades(count), fps=fps)
    return path


def write_video(path, codec="mpeg4", times=None, fps=10, **options):
    """Writes `shades` by PyAV, each at its time in hundredths of a second."""
    av = pytest.importorskip("av")
    from fractions import Fraction

    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100)
        for number, pixels in enumerate(shades()):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = Fraction(1, 100)
            frame.pts = (times or range(0, 2000, 100 // fps))[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seen(source, times):
    """The number of the frame that is shown at each time, by its grey."""
    with clips.opened(source) as clip:
        frames = list(clips.frames_at(clip, np.array(times)))
        return [round((float(f[-8:, -8:].mean()) - 10) / 10) for f in frames], frames, clip.seconds


def test_arrays_have_the_clock_that_they_say(tmp_path):
    path = write_npz(tmp_path / "a.npz")
    for source in (path, path.read_bytes()):
        numbers, frames, seconds = seen(source, [0.0, 0.3, 0.39, 1.95, 5.0])
        assert numbers == [0, 3, 3, 19, 19] and seconds == 2.0
        np.testing.assert_array_equal(frames[1], shades()[3])
    np.save(tmp_path / "a.npy", shades())
    assert seen(tmp_path / "a.npy", [0.0, 0.121])[0] == [0, 3]  # of 25 frames a second
    assert clips.check(path) == clips.check(tmp_path / "a.npy") == ""


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_moving_pictures_have_the_lengths_of_their_frames(tmp_path, suffix):
    pictures = [Image.fromarray(each) for each in shades(4)]
    first, *rest = pictures
    path, lengths = tmp_path / f"a.{suffix}", [100, 300, 100, 500]
    first.save(path, save_all=True, append_images=rest, duration=lengths, lossless=True)
    numbers, frames, seconds = seen(path, [0.05, 0.1, 0.39, 0.4, 0.6, 0.9])
    assert numbers == [0, 1, 1, 2, 3, 3] and seconds == pytest.approx(1.0)
    assert np.abs(frames[1][2, 2].astype(int) - (255, 0, 0)).max() < 8
    assert "uneven" in clips.check(path)


def test_a_picture_is_a_video_of_one_frame(tmp_path):
    Image.fromarray(shades()[3]).save(tmp_path / "a.png")
    numbers, _, seconds = seen(tmp_path / "a.png", [0.0])
    assert numbers == [3] and seconds == 0.0 and clips.check(tmp_path / "a.png") == ""


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")],
)
def test_containers_are_sampled_by_time(tmp_path, name, codec):
    path = write_video(tmp_path / name, codec)
    for source in (path, path.read_bytes()):
        numbers, frames, seconds = seen(source, [0.0, 0.31, 0.35, 1.2, 1.95])
        assert numbers == [0, 3, 3, 12, 19] and seconds == pytest.approx(2.0, abs=0.1)
        red = frames[0][4, 4].astype(int)
        assert red[0] > 200 and red[1:].max() < 60
    assert clips.check(path) == ""


@pytest.mark.parametrize("name", ["a.mpg", "a.ts"])
def test_streams_that_are_found_too_late_are_sampled_by_time(tmp_path, name):
    """They are found at the key frame after the one that is asked for."""
    av = pytest.importorskip("av")
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.gop_size, stream.bit_rate = 4, 2_000_000
        for pixels in shades():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    every = [(number + 0.5) / 25 for number in range(20)]
    assert seen(path, every)[0] == list(range(20))
    for number, time in enumerate(every):
        assert seen(path.read_bytes(), [time])[0] == [number]
    assert clips.check(path) == ""


def test_a_variable_rate_is_kept(tmp_path):
    """Half of the frames within a second, the others a second each."""
    times = [10 * n for n in range(10)] + [100 * n for n in range(1, 11)]
    path = write_video(tmp_path / "a.mp4", times=times)
    numbers, _, seconds = seen(path, [0.5, 1.0, 4.5, 9.99])
    assert numbers == [5, 10, 13, 18] and seconds > 10
    assert "uneven" in clips.check(path)


def test_a_turned_video_is_put_upright(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd")
    # A quarter clockwise: the matrix of the track's header, in 16.16 and 2.30 bits.
    turn = np.array([0, 1 << 16, 0, -(1 << 16), 0, 0, 48 << 16, 0, 1 << 30], ">i4")
    content[header + 44 : header + 80] = turn.tobytes()
    path.write_bytes(bytes(content))
    _, frames, _ = seen(path, [0.0])
    assert frames[0].shape == (64, 48, 3)
    corner = frames[0][4, -4].astype(int)
    assert corner[0] > 200 and corner[1:].max() < 60
    assert "turned by" in clips.check(path)


def bad_arrays(folder):
    np.savez(folder / "other.npz", pictures=shades(2))
    np.save(folder / "floats.npy", shades(2).astype("f4"))
    np.save(folder / "nothing.npy", shades(0))
    np.savez(folder / "still.npz", frames=shades(2), fps=0.0)
    (folder / "cut.npz").write_bytes(write_npz(folder / "whole.npz").read_bytes()[:300])
    (folder / "empty.mp4").write_bytes(b"")
    return {
        "other.npz": "no array 'frames'",
        "floats.npy": "not uint8",
        "nothing.npy": "not uint8",
        "still.npz": "0.0 frames a second",
        "cut.npz": "no array that can be read",
        "empty.mp4": "the file is empty",
        "missing.mp4": "No such file",
    }


def bad_containers(folder):
    av = pytest.importorskip("av")
    fast = write_video(folder / "fast.mp4", movflags="faststart").read_bytes()
    (folder / "cut.mp4").write_bytes(fast[: 3 * len(fast) // 4])
    (folder / "headless.mp4").write_bytes(write_video(folder / "w.mp4").read_bytes()[:2000])
    webm = write_video(folder / "w.webm", "libvpx").read_bytes()
    (folder / "cut.webm").write_bytes(webm[: len(webm) // 2])
    (folder / "text.mp4").write_text("no video")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), "f4"), format="fltp", layout="mono")
        frame.rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {
        "cut.mp4": "cut short|damaged",
        "headless.mp4": "no video that can be read|no frame",
        "cut.webm": "cut short|damaged",
        "text.mp4": "no video that can be read",
        "sound.mp4": "no video stream",
    }


@pytest.mark.parametrize("kind", [bad_arrays, bad_containers])
def test_bad_files_are_refused(tmp_path, kind):
    for name, fault in kind(tmp_path).items():
        with pytest.raises(clips.ClipError, match=f"{name}: .*({fault})"):
            clips.check(tmp_path / name)


def test_an_upload_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    def refused(content, what):
        with pytest.raises(clips.ClipError, match=what), clips.opened(content, limited=True):
            pass

    array = write_npz(tmp_path / "long.npz", count=3, fps=0.001).read_bytes()
    refused(array, "3000 seconds are over 600")
    with clips.opened(array):  # a file of one's own may be as long as it is
        pass
    shown = []
    monkeypatch.setattr(clips._Pictures, "_show", lambda self, number: shown.append(number))
    monkeypatch.setattr(clips, "MAX_DECODED", 8 * 8 * 3 - 1)
    moving = io.BytesIO()
    first, *others = (Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(3))
    first.save(moving, "GIF", save_all=True, append_images=others)
    refused(moving.getvalue(), "frames of 192 pixels in all are over 191")
    assert not shown  # it is refused before any frame is decoded


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    (tmp_path / "any.mp4").write_text("no picture")
    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(ValueError, match=r"PyAV.*unified_mm\[video\]") as error:
        clips.check(tmp_path / "any.mp4")
    assert not isinstance(error.value, clips.ClipError)


def manifest_of(folder, cache, **changes):
    data = default_config().data
    data.dir, data.cache_dir = str(folder), str(cache)
    data.update(changes)
    source = given_folder(data)
    return source, {name: source.manifest(name) for name in source.splits()}


def test_a_coco_file_may_name_videos(tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in ("a", "b"):
        write_npz(tmp_path / f"{name}.npz")
    np.savez(tmp_path / "c.npz", frames=shades(2)[:, :, :, 0])
    Image.fromarray(shades()[3]).save(tmp_path / "still.png")
    videos = [{"id": n, "video": f"{name}.npz"} for n, name in enumerate("abc")]
    videos += [{"id": 3, "video": "still.png"}, {"id": 4, "video": "gone.npz"}]
    captions = [{"image_id": n, "caption": f"clip {n}"} for n in range(5)]
    listed = json.dumps({"images": videos, "annotations": captions})
    (tmp_path / "annotations" / "captions_train.json").write_text(listed)
    _, found = manifest_of(tmp_path, tmp_path / "cache", max_bad_share=0.5)
    records = found["train"].records
    assert [(r.id, r.parts) for r in records] == [
        (0, {"video": str(tmp_path / "a.npz")}),
        (1, {"video": str(tmp_path / "b.npz")}),
        (3, {"video": str(tmp_path / "still.png")}),
    ]
    told = summary(found["train"])
    assert "3 videos" in told and "not uint8 [frames" in told and "missing video" in told
    assert records[1].texts[0].target == "clip 1"


def test_msrvtt_and_tables_of_videos(tmp_path):
    folder = tmp_path / "msrvtt"
    (folder / "TrainValVideo").mkdir(parents=True)
    for number in range(3):
        (folder / "TrainValVideo" / f"video{number}.mp4").write_bytes(b"x")
    splits = ("train", "train", "validate")
    videos = [{"video_id": f"video{n}", "split": split} for n, split in enumerate(splits)]
    sentences = [{"video_id": f"video{n % 3}", "caption": f"caption {n}"} for n in range(6)]
    listed = json.dumps({"videos": videos, "sentences": sentences})
    (folder / "train_val_videodatainfo.json").write_text(listed)
    found = LAYOUTS["msrvtt"][1](Folder(folder))
    train = found["train"]().entries
    assert [entry.captions for entry in train] == [
        ("caption 0", "caption 3"),
        ("caption 1", "caption 4"),
    ]
    assert train[1].parts == (("video", folder / "TrainValVideo" / "video1.mp4"),)
    assert len(found["val"]().entries) == 1
    sentences.append({"video_id": "video9", "caption": "of none"})
    (folder / "train_val_videodatainfo.json").write_text(
        json.dumps({"videos": videos, "sentences": sentences})
    )
    found = LAYOUTS["msrvtt"][1](Folder(folder))
    (problem,) = found["train"]().caption_problems
    assert problem.what == "caption of an unlisted video" and "sentences[6]" in problem.file
    assert found["train"]().annotations == 5 and not found["val"]().problems
    # The test set is a file of its own.
    tested = {
        "videos": [{"video_id": "video7", "split": "test"}],
        "sentences": [{"video_id": "video7", "caption": "caption 7"}],
    }
    (folder / "test_videodatainfo.json").write_text(json.dumps(tested))
    both = LAYOUTS["msrvtt"][1](Folder(folder))
    assert set(both) == {"train", "val", "test"} and len(both["train"]().entries) == 2

    for field in ("video", "path", "clip"):
        table = tmp_path / field
        table.mkdir()
        (table / "a.mp4").write_bytes(b"x")
        (table / "meta.csv").write_text(f"{field},caption\na.mp4,a dog\n")
        (entry,) = LAYOUTS["table"][1](Folder(table))["all"]().entries
        assert entry.parts == (("video", table / "a.mp4"),) and entry.image is None


def test_folders_of_classes_hold_videos(tmp_path):
    for kind in ("run_fast", "jump"):
        (tmp_path / kind).mkdir()
        for number in range(3):
            write_video(tmp_path / kind / f"{number}.avi")
    listing = LAYOUTS["classes"][1](Folder(tmp_path))["all"]()
    found = build_manifest(listing, tmp_path, "all")
    assert len(found.records) == 6 and not found.problems
    record = found.records[-1]
    assert record.labels == ("run fast",) and list(record.parts) == ["video"]
