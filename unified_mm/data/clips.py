"""Clips: frames of any video at the times of its own clock, as RGB arrays, one at a time."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable
from zipfile import ZipFile

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from unified_mm.data import images
from unified_mm.data.arrays import read_array
from unified_mm.data.records import Source, Stored

CONTAINERS = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .ogv .webm .wmv".split())
ARRAYS = frozenset({".npz", ".npy"})
PICTURES = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's formats
SUFFIXES = CONTAINERS | ARRAYS | images.SUFFIXES
FPS = 25.0  # of arrays that do not say theirs
MAX_PIXELS = 16 * 1024 * 1024  # of a frame
MAX_BYTES = 1 << 30  # of an array
# What anybody's upload may take: a minute of decoding or so.
MAX_SECONDS = 600.0
MAX_DECODED = 1 << 34  # pixels of all its frames

# What reads playlists or addresses would go out into the network.
OPTIONS = {
    "fflags": "genpts",
    "format_whitelist": "asf,avi,matroska,webm,mov,mp4,mpeg,mpegts,mpegvideo,ogg",
    "protocol_whitelist": "",
}

Frame = UInt8[np.ndarray, "height width 3"]


class ClipError(ValueError):
    """The error that a video cannot be used.

    Attributes:
      what: the fault, without the file's name.
    """

    def __init__(self, name: str, what: str) -> None:
        super().__init__(name, what)  # both as args, so that it survives pickling
        self.name, self.what = name, what

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@runtime_checkable
class Clip(Protocol):
    """An opened video.

    Attributes:
      times: seconds from the first frame at which each is shown.
      seconds: until the last one ends; 0 for a picture.
      pixels: of a frame.
      converted: what is done to the frames, '' for nothing.
    """

    times: Float[np.ndarray, " S"]
    seconds: float
    pixels: int
    converted: str

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        """Yields the frames of numbers that do not fall."""


@contextmanager
def opened(source: Source, *, limited: bool = False) -> Iterator[Clip]:
    """Opens a video by what it holds: a container, an array, or a picture, moving or not.

    A container needs PyAV, of the extra 'video'. A `.npz` has `frames`, uint8 [S, height, width,
    3], and may have `fps`; a `.npy` is such frames.

    Args:
      source: a file, or what it holds.
      limited: whether to refuse what takes long to decode (`MAX_SECONDS`, `MAX_DECODED`).

    Raises:
      ClipError: it cannot be read, is no video, or takes too long.
    """
    name = "the video" if isinstance(source, bytes) else str(source)
    try:
        held = source.read() if isinstance(source, Stored) else source
        with io.BytesIO(held) if isinstance(held, bytes) else open(held, "rb") as file:
            head = file.read(8)
            file.seek(0)
            if not head:
                raise ClipError(name, "the file is empty")
            clip = _clip(file, name, head, limited)
            try:
                if limited:
                    _refuse_long(name, clip.seconds, clip.pixels * len(clip.times))
                yield clip
            finally:
                if isinstance(clip, _Container):
                    clip.close()
    except OSError as error:
        raise ClipError(name, f"unreadable: {error.strerror or error}") from error


def _clip(file: Any, name: str, head: bytes, limited: bool) -> Clip:
    if head.startswith((b"\x93NUMPY", b"PK\x03\x04")):
        return _Array(file, name, zipped=head.startswith(b"PK"))
    if picture := _picture(file, name):
        return _Pictures(picture, name, limited)
    file.seek(0)
    return _Container(file, name)


def frames_at(clip: Clip, times: Float[np.ndarray, " S"]) -> Iterator[Frame]:
    """Yields the frame that is shown at each of some times, in seconds that do not fall."""
    return clip.frames(shown_at(clip.times, times).tolist())


def shown_at(
    shown: Float[np.ndarray, " frames"], times: Float[np.ndarray, " S"]
) -> Int[np.ndarray, " S"]:
    """Returns the number of the frame that is shown at each time: the last that has begun."""
    return np.maximum(np.searchsorted(shown, times + 1e-6, side="right") - 1, 0)


def check(source: Source) -> str:
    """Decodes a video completely, a frame at a time; returns what was converted, '' for nothing.

    Raises:
      ClipError: it cannot be read, or is shorter than it says.
    """
    with opened(source) as clip:
        for _ in clip.frames(range(len(clip.times))):
            pass
        found = [clip.converted] if clip.converted else []
        gaps = np.diff(clip.times)
        if len(gaps) and gaps.max() > 1.5 * gaps.min() + 2e-3:
            found.append("frames of uneven lengths sampled by time")
    return ", ".join(found)


def _refuse_long(name: str, seconds: float, pixels: int) -> None:
    """Raises ClipError for a video whose decoding would take too long."""
    if seconds > MAX_SECONDS:
        raise ClipError(name, f"{seconds:.0f} seconds are over {MAX_SECONDS:.0f}")
    if pixels > MAX_DECODED:
        raise ClipError(name, f"frames of {pixels:,} pixels in all are over {MAX_DECODED:,}")


class _Array:
    """Frames in an array."""

    converted = ""

    def __init__(self, file: Any, name: str, zipped: bool) -> None:
        fps: Any = FPS

        def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                fault = f"{dtype} {list(shape)}, not uint8 [frames, height, width, 3]"
                raise ClipError(name, fault)
            if zipped and (size := math.prod(shape)) > MAX_BYTES:
                raise ClipError(name, f"an array of {size:,} bytes is over {MAX_BYTES:,}")

        try:
            if zipped:
                with ZipFile(file) as members:
                    with members.open("frames.npy") as member:
                        self._frames = read_array(member, check)
                    if "fps.npy" in members.namelist():
                        with members.open("fps.npy") as member:
                            fps = read_array(member, _check_fps)
            else:
                self._frames = read_array(file, check)
            fps = float(fps)
        except ClipError:
            raise
        except KeyError as error:
            raise ClipError(name, "no array 'frames' in it") from error
        except Exception as error:  # whatever their parsers meet
            raise ClipError(name, f"no array that can be read: {error}") from error
        if not (np.isfinite(fps) and fps > 0):
            raise ClipError(name, f"{fps} frames a second")
        count, height, width, _ = self._frames.shape
        self.times, self.seconds = np.arange(count) / fps, count / fps
        self.pixels = height * width

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        return (self._frames[number] for number in numbers)


def _check_fps(shape: tuple[int, ...], dtype: np.dtype) -> None:
    if math.prod(shape) != 1:
        raise ValueError(f"fps of the shape {list(shape)}, not one number")


def _picture(file: Any, name: str) -> Any:
    """Returns what Pillow opens of a file, None where it is no picture."""
    try:
        return Image.open(file, formats=PICTURES)
    except Image.UnidentifiedImageError:
        return None
    except Exception as error:  # decoders raise whatever their parsers meet
        raise ClipError(name, f"no picture that can be read: {error}") from error


class _Pictures:
    """A picture, which may move: GIF, WebP."""

    converted = ""

    def __init__(self, image: Any, name: str, limited: bool) -> None:
        self._image, self._name = image, name
        self.pixels = image.size[0] * image.size[1]
        if self.pixels > MAX_PIXELS:
            raise ClipError(name, _too_large(*image.size))
        count, ends = getattr(image, "n_frames", 1), [0.0]
        # A page of a document or a second view of a photograph is not a later moment.
        count = count if image.format in ("GIF", "WEBP", "PNG") else 1
        for number in range(count if count > 1 else 0):
            if limited:  # before it is decoded: how long a frame lasts is known when it is shown
                _refuse_long(name, ends[-1], count * self.pixels)
            self._show(number)
            # Those that ask for no time are shown for a tenth of a second, as browsers do it.
            ends.append(ends[-1] + (float(image.info.get("duration", 0)) or 100.0) / 1000)
        self.times, self.seconds = np.array(ends[:-1] or [0.0]), ends[-1]

    def _show(self, number: int) -> None:
        try:
            self._image.seek(number)
            self._image.load()
        except Exception as error:  # decoders raise whatever their parsers meet
            raise ClipError(self._name, f"damaged: frame {number}: {error}") from error

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        for number in numbers:
            self._show(number)
            try:
                yield images.from_pil(self._image)
            except images.ImageError as error:
                raise ClipError(self._name, error.what) from error


class _Container:
    """The first video stream of a container, by PyAV."""

    def __init__(self, file: Any, name: str) -> None:
        self._av, self._name = _library(), name
        try:
            self._container = self._av.open(file, options=OPTIONS)
        except self._av.FFmpegError as error:
            raise ClipError(name, f"no video that can be read: {error.strerror}") from error
        try:
            self._list()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._container.close()

    def _list(self) -> None:
        """Reads when each frame is shown, of all packets: headers may be wrong about it."""
        container, name = self._container, self._name
        if not container.streams.video:
            raise ClipError(name, "no video stream")
        self._stream = stream = container.streams.video[0]
        self.pixels = stream.width * stream.height
        if self.pixels > MAX_PIXELS:
            raise ClipError(name, _too_large(stream.width, stream.height))
        stream.codec_context.thread_count = 1  # the reader's threads are the parallelism
        shown, keys, lengths, end = [], [], [], 0.0
        try:
            for packet in container.demux():
                if packet.pts is None:
                    if packet.size and packet.stream is stream:
                        raise ClipError(name, "frames without times: put it into a mp4")
                    continue
                length = packet.duration or 0
                end = max(end, float((packet.pts + length) * packet.time_base))
                if packet.stream is stream and not packet.is_discard:
                    shown.append(packet.pts)
                    lengths.append(length)
                    keys += [packet.pts] if packet.is_keyframe else []
        except self._av.FFmpegError as error:
            raise ClipError(name, f"damaged: {error.strerror}") from error
        if not shown:
            raise ClipError(name, "no frame")
        told = (container.duration or 0) / self._av.time_base
        begins = (container.start_time or 0) / self._av.time_base
        # An AVI counts moments without a frame, too; Matroska counts none.
        counted = stream.frames if "mp4" in container.format.name else 0
        if len(shown) < counted or end - begins < 0.95 * told - 0.25:
            raise ClipError(
                name, f"cut short: {len(shown)} frames, {end - begins:.2f} of {told:.2f} seconds"
            )
        order = np.argsort(shown, kind="stable")
        self._pts = np.array(shown)[order]
        self._keys = np.sort(keys)
        step = float(stream.time_base)
        last = np.array(lengths)[order][-1] or (np.diff(self._pts).mean() if len(shown) > 1 else 0)
        self.times = (self._pts - self._pts[0]) * step
        self.seconds = float(self.times[-1] + last * step)
        self.converted = ""

    def frames(self, numbers: Sequence[int]) -> Iterator[Frame]:
        """Decodes from the key frame before each number, or on from the last frame."""
        container, stream = self._container, self._stream
        decoded: Iterator[Any] = iter(())
        frame: Any = None  # that was decoded last
        given = None  # what was made of it
        for number in numbers:
            target = int(self._pts[number])
            starts = self._starts(target)
            if frame is None or frame.pts < starts[0]:
                for start in starts:
                    with self._naming_faults():
                        container.seek(start, stream=stream)
                        decoded = container.decode(stream)
                        frame, given = next(decoded, None), None
                    if _is_whole(frame) and frame.pts <= target:
                        break
            while _is_whole(frame) and frame.pts < target:
                with self._naming_faults():
                    frame, given = next(decoded, None), None
            if not _is_whole(frame):
                raise self._lost(number)
            # Of a packet without a picture of its own, as old encoders write, it is the next one's.
            if frame.pts > self._pts[min(number + 1, len(self._pts) - 1)]:
                raise self._lost(number)
            given = self._upright(frame) if given is None else given
            yield given

    def _starts(self, target: int) -> list[int]:
        """Returns where a frame may be sought: from its key frame, or the beginning.

        Within MPEG's streams not each frame has a time, and what is found is later than was asked.
        """
        first = min(0, int(self._pts[0]))
        if self._container.format.name in ("mpeg", "mpegts"):
            return [first]
        place = max(int(np.searchsorted(self._keys, target, side="right")) - 1, 0)
        return [int(self._keys[place] if len(self._keys) else self._pts[0]), first]

    @contextmanager
    def _naming_faults(self) -> Iterator[None]:
        try:
            yield
        except self._av.FFmpegError as error:
            raise ClipError(self._name, f"damaged: {error.strerror}") from error

    def _lost(self, number: int) -> ClipError:
        return ClipError(self._name, f"damaged: no frame at {self.times[number]:.2f} s")

    def _upright(self, frame: Any) -> Frame:
        if frame.width * frame.height > MAX_PIXELS:
            raise ClipError(self._name, _too_large(frame.width, frame.height))
        turns = round(frame.rotation / 90) % 4
        if turns:
            self.converted = f"turned by {frame.rotation % 360} degrees"
        return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def _is_whole(frame: Any) -> bool:
    return frame is not None and frame.pts is not None and not frame.is_corrupt


def _too_large(width: int, height: int) -> str:
    return f"frames of {width} x {height} pixels are over the limit of {MAX_PIXELS:,}"


def _library() -> Any:
    """Returns PyAV, of the extra 'video', which is imported where videos are met.

    Raises:
      ValueError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module("av")
    except ImportError as error:
        raise ValueError(
            "videos need PyAV, of the extra 'video': pip install 'unified_mm[video]'"
        ) from error
