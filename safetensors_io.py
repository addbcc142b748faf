"""Tensors in files: what safetensors says of them, and how they are read and written in rectangles.

A tensor is a matrix, and each file that has some of it has a rectangle of it, a `Slice2D`: a `ShardSlice`. All of these
together are a `ShardedTensor`, from which any rectangle can be read, a band of rows at a time: nothing larger than that
is in memory.

A safetensors file is the length of a header in eight bytes, the header, JSON that says of each tensor its dtype, shape
and place, and then the tensors' bytes. Headers are read here and not believed: what is wrong in one is told in a line
that names the file and the tensor.

FP8 weights have a scale for each block of 128×128, which a file counts from the corner of its own rectangle. So a cut
through a block, or a seam within one, is exact if no new block needs two different scales, and refused otherwise.

A folder of files is never seen half-written: it is filled under a temporary name, flushed to disk and renamed. A lock
beside it, which the system releases however a process ends, keeps a second process from filling the same one, and what
a dead one left there is known by it.
"""

import errno
import json
import math
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from command import shorten
from fp8_ops import BLOCK, E4M3, weight_dequant, weight_quant
from model import ConfigError

BAND_BYTES = 1 << 20  # read of a tensor at a time: much for a disk, little for a cache and for malloc
MAX_JSON_BYTES = 64 << 20  # of a config or an index; that of a trillion parameters has 20
MAX_JSON_DEPTH = 50  # far below what Python can print or walk through by recursion
MAX_DIMS = 8
MAX_HEADER_BYTES = 32 << 20  # a trillion parameters in 400 experts a layer, all in one file, need half of it
# The dtypes of safetensors, in its own order: a file's tensors lie in the opposite one.
DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": E4M3},
    **{"F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16},
    **{"BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64},
    **{"I64": torch.int64, "U64": torch.uint64},
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # all widen to float32 exactly
_NONBLOCK, _NOFOLLOW = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_NOFOLLOW", 0)  # Windows has neither
_HAS_DIR_FD = os.open in os.supports_dir_fd
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there, or choose another place")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model: the message names the file and the remedy."""


# --- Rectangles ------------------------------------------------------------------------------------------------------


class Slice2D(NamedTuple):
    """A rectangle of a matrix: rows `top` to `bottom` and columns `left` to `right`, ends excluded."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left

    def meet(self, other: "Slice2D") -> "Slice2D | None":
        """The part that two rectangles share; None where there is none."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Slice2D(top, bottom, left, right) if top < bottom and left < right else None

    def within(self, outer: "Slice2D") -> tuple[slice, slice]:
        """Its rows and columns, counted from the corner of a rectangle around it."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return rows, slice(self.left - outer.left, self.right - outer.left)


def slice_scales(parts: list[tuple[Slice2D, torch.Tensor]], box: Slice2D) -> torch.Tensor | None:
    """Finds the scales of a rectangle of FP8 weights which stay as they are while their blocks become others.

    Args:
        parts: Rectangles side by side, or one above the other, each with its scales (⌈rows/128⌉, ⌈columns/128⌉).
        box: The rectangle asked for, anywhere in them.

    Returns:
        Its scales, or None where a block would need two different ones.
    """
    across = int(len({part.left for part, _ in parts}) > 1)  # the dimension in which they follow each other
    parts = sorted(parts, key=lambda item: item[0])
    scales = torch.cat([s for _, s in parts], dim=across)
    rows_and_columns = []
    for dim in (0, 1):
        sizes = [part.shape[dim] for part, _ in (parts if dim == across else parts[:1])]
        blocks, first = [], 0  # of each row, or column, the block that it is in
        for size in sizes:
            blocks.append(torch.arange(size) // BLOCK + first)
            first += -(-size // BLOCK)
        start = (box.top - parts[0][0].top, box.left - parts[0][0].left)[dim]
        old = torch.cat(blocks)[start : start + box.shape[dim]]
        scales = scales.narrow(dim, int(old[0]), int(old[-1] - old[0]) + 1)
        rows_and_columns.append(old - old[0])
    for dim, old in enumerate(rows_and_columns):
        new = old[::BLOCK]
        edges = (old.diff(prepend=old[:1] - 1) != 0).nonzero().flatten()  # where an old block begins
        if not torch.equal(scales.index_select(dim, old[edges]), scales.index_select(dim, new[edges // BLOCK])):
            return None
        scales = scales.index_select(dim, new)
    return scales


def is_block_aligned(box: Slice2D) -> bool:
    """Whether each block of a rectangle lies within one block of the whole matrix."""
    ends = ((box.top, box.bottom), (box.left, box.right))
    return all(
        x // BLOCK == (min(x + BLOCK, end) - 1) // BLOCK for start, end in ends for x in range(start, end, BLOCK)
    )


# --- safetensors -----------------------------------------------------------------------------------------------------


class TensorInfo(NamedTuple):
    """A tensor in a file: what it is, and at which byte of the file it starts."""

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.path}: tensor {shorten(self.name)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Reads the whole tensor, whose numbers must be finite."""
        out = torch.empty(self.nbytes, dtype=torch.uint8)
        with open_regular(self.path) as file:
            _fill(file, self.offset, out)
        out = out.view(self.dtype).view(self.shape)
        check_finite(out, self)
        return out


def check_finite(data: torch.Tensor, info: TensorInfo) -> None:
    """Refuses numbers that a checkpoint cannot mean.

    Args:
        data: A part of a tensor, of any dtype.
        info: The tensor, for the message.

    Raises:
        CheckpointError: It holds NaN or infinity.
    """
    if not _is_finite(data):
        raise CheckpointError(f"{info} holds numbers that are not finite, NaN or infinity; take an intact checkpoint")


def _is_finite(data: torch.Tensor) -> bool:
    """Whether all numbers are finite, at a small part of what reading them costs."""
    if not data.numel() or not data.dtype.is_floating_point:
        return True
    if data.dtype == E4M3:  # it has no infinity, and NaN is 0x7f or 0xff
        return bool(data.view(torch.uint8).max() < 0xFF and data.view(torch.int8).max() < 0x7F)
    if data.itemsize == 1:
        data = data.float()
    return bool(data.sum().isfinite() or data.isfinite().all())  # a sum costs a tenth of `isfinite`, but may overflow


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads the header of a safetensors file.

    Args:
        path: The file.

    Returns:
        Its tensors by name, not yet read.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors, or the header contradicts itself or the file.
    """
    header, start = _read_raw_header(path)
    header.pop("__metadata__", None)
    infos = {}
    for name, value in header.items():
        what, (begin, end) = f"{path}: tensor {shorten(name)}", value["data_offsets"]
        if value["dtype"] not in DTYPES:
            raise CheckpointError(f"{what} is {shorten(value['dtype'])}, a dtype that torch does not have")
        if len(value["shape"]) > MAX_DIMS:
            raise CheckpointError(f"{what} has {len(value['shape'])} dimensions, more than {MAX_DIMS}")
        infos[name] = TensorInfo(path, name, DTYPES[value["dtype"]], tuple(value["shape"]), start + begin)
        if end - begin != infos[name].nbytes:
            raise CheckpointError(f"{what} takes {infos[name].nbytes} bytes, the header says {end - begin}")
    return infos


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata in the header of a safetensors file: the library that it is meant for, say."""
    return _read_raw_header(path)[0].get("__metadata__") or {}


def _read_raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON object at the start of a safetensors file, which safetensors has checked, and the byte where it ends."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size or length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is truncated or no safetensors file: {size} bytes, a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        with safe_open(path, "numpy"):  # refuses all else that is wrong: types, overflows, gaps, lone surrogates
            pass
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {shorten(error, 300)}") from None
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, no key of which occurs twice or could not be written again."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"{shorten(key)} is in it twice")
    "".join(found).encode()
    return found


def _fill(file: Any, offset: int, out: torch.Tensor) -> None:
    """Reads bytes from `offset` on into contiguous uint8 memory; other threads run meanwhile."""
    view, done = memoryview(out.reshape(-1).numpy()), 0
    file.seek(offset)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{file.name} ends before byte {offset + len(view)}: it was truncated meanwhile")
        done += count


def write_all(file: Any, tensor: torch.Tensor) -> None:
    """Writes a tensor's bytes to an unbuffered file, which may take some of them at a time."""
    view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:  # which does not know of what file
        raise OSError(error.errno, error.strerror, file.name) from None


class SafetensorsWriter:
    """A safetensors file to be written, laid out as safetensors itself does it.

    Args:
        name: The file's name.
        tensors: Dtype and shape of each tensor.
        metadata: What else the file says about itself; transformers wants "format".

    Attributes:
        infos: The tensors and their places.
        header: The bytes before them.
        size: Bytes in all.
    """

    def __init__(
        self, name: str, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None = None
    ):
        order, end = list(DTYPES.values()), 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
        places = {}
        for key in sorted(tensors, key=lambda key: (-order.index(tensors[key][0]), key)):
            places[key] = TensorInfo(Path(name), key, *tensors[key], end)
            start, end = end, end + places[key].nbytes
            dtype, shape = DTYPE_NAMES[tensors[key][0]], list(tensors[key][1])
            header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.name, self.header = name, len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + end
        self.infos = {key: info._replace(offset=len(self.header) + info.offset) for key, info in places.items()}

    def create(self, folder: Path) -> None:
        """Makes the file, with room for the tensors behind its header."""
        with open(folder / self.name, "xb") as file:
            file.write(self.header)
            file.truncate(self.size)


# --- Tensors in pieces -----------------------------------------------------------------------------------------------


class ShardSlice(NamedTuple):
    """A rectangle of a tensor in a file, and its scales if it is FP8."""

    info: TensorInfo
    box: Slice2D
    scale: TensorInfo | None = None

    def read(self, part: Slice2D, out: torch.Tensor) -> None:
        """Reads a part of the rectangle, as it is stored, into uint8 (rows, bytes of a row)."""
        size = self.info.dtype.itemsize
        rows, cols = part.within(self.box)
        stride = self.box.shape[1] * size
        with open_regular(self.info.path) as file:
            if out.is_contiguous() and out.shape[1] == stride:
                _fill(file, self.info.offset + rows.start * stride, out)
            else:  # only what is asked for of each row, to where it belongs
                for i, row in enumerate(out, rows.start):
                    _fill(file, self.info.offset + i * stride + cols.start * size, row)

    def read_scales(self, around: Slice2D) -> torch.Tensor:
        """Reads and checks the scales of a band: whole rows, from where a row of blocks begins to where one ends."""
        rows = around.within(self.box)[0]
        first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
        cols = self.scale.shape[1]
        offset = self.scale.offset + first * cols * self.scale.dtype.itemsize
        s = self.scale._replace(shape=(last - first, cols), offset=offset).read().float()
        if (s < 0).any():
            raise CheckpointError(f"{self.scale} has scales that are not all finite and positive")
        for i in (s == 0).any(1).nonzero().flatten().tolist():  # no writer means that, except of blocks of zeros
            top = around.top + i * BLOCK
            band = around._replace(top=top, bottom=min(top + BLOCK, around.bottom))
            self.read(band, q := torch.empty(band.shape, dtype=torch.uint8))
            if ((q & 0x7F != 0) & (s[i] == 0).repeat_interleave(BLOCK)[: band.shape[1]]).any():
                raise CheckpointError(f"{self.scale} has a scale of zero for weights that are not zero")
        return s


def shard_slice(info: TensorInfo, box: Slice2D, scale: TensorInfo | None) -> ShardSlice:
    """Puts a weight and its scales together, once they are checked to fit.

    Raises:
        CheckpointError: An FP8 weight without scales, or with some of another shape or dtype.
    """
    if info.dtype == E4M3:
        wanted = tuple(-(-n // BLOCK) for n in box.shape)
        if scale is None:
            raise CheckpointError(f"{info} is FP8, but its scale is missing")
        if scale.dtype not in SCALE_DTYPES or scale.shape != wanted:
            got = f"{DTYPE_NAMES[scale.dtype]} {list(scale.shape)}, not F32 (or BF16, F8_E8M0) {list(wanted)}"
            raise CheckpointError(f"{scale}, the scale of a weight {list(info.shape)}, is {got}")
    return ShardSlice(info, box, scale)


@dataclass
class ShardedTensor:
    """A tensor, wherever its pieces are.

    Attributes:
        name: Its name in the files.
        shape: Its whole shape.
        dtype: What it is stored in.
        shards: Rectangles that cover it.
        replicas: More of the whole, which must be equal: replicated to each rank, or to the MTP modules.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    shards: list[ShardSlice] = field(default_factory=list)
    replicas: list[ShardSlice] = field(default_factory=list)

    @property
    def box(self) -> Slice2D:
        shape = (1, *self.shape)
        return Slice2D(0, math.prod(shape[:-1]), 0, shape[-1])

    def bands(self, box: Slice2D, step: int = 1) -> Iterator[Slice2D]:
        """Cuts a rectangle into bands to be read at a time: of whole rows, a multiple of `step`, where a row is short.

        A row longer than BAND_BYTES, as a large vector is, is cut too, after a multiple of 128 columns.
        """
        if 0 in box.shape:
            return
        row_bytes = box.shape[1] * self.dtype.itemsize
        height = max(step, BAND_BYTES // row_bytes // step * step)
        width = box.shape[1]
        if row_bytes > BAND_BYTES:
            width = BAND_BYTES // (min(height, box.shape[0]) * self.dtype.itemsize)
            width = max(BLOCK, width // BLOCK * BLOCK)
        for top in range(box.top, box.bottom, height):
            for left in range(box.left, box.right, width):
                yield Slice2D(top, min(top + height, box.bottom), left, min(left + width, box.right))

    def read_bytes(self, box: Slice2D) -> torch.Tensor:
        """Reads a rectangle as it is stored: uint8 (rows, bytes of a row).

        Raises:
            CheckpointError: It holds NaN or infinity, or the copies, if there are any, differ.
        """
        size = self.dtype.itemsize
        out = torch.empty(box.shape[0], box.shape[1] * size, dtype=torch.uint8)
        for piece in self.shards:
            if (part := piece.box.meet(box)) is not None:
                rows, cols = part.within(box)
                piece.read(part, out[rows, cols.start * size : cols.stop * size])
        numbers = out.view(self.dtype)
        if not _is_finite(numbers):
            for piece in self.shards:
                if (part := piece.box.meet(box)) is not None:
                    check_finite(numbers[part.within(box)], piece.info)
        for copy in self.replicas:
            copy.read(box, other := torch.empty_like(out))
            if not torch.equal(other, out):
                raise self._differs(copy.info, self.shards[0].info)
        return out

    def read_scales(self, box: Slice2D | None = None) -> list[tuple[Slice2D, torch.Tensor]]:
        """Reads the scales of FP8 weights.

        Args:
            box: A rectangle of the tensor; by default all of it.

        Returns:
            For each shard that has some of it: the rows of whole blocks around that, and their scales.

        Raises:
            CheckpointError: They are not finite and positive, or the copies, if there are any, differ.
        """
        found = []
        for piece in self.shards:
            if (part := piece.box.meet(box or self.box)) is None:
                continue
            rows = part.within(piece.box)[0]
            top = piece.box.top + rows.start // BLOCK * BLOCK
            bottom = min(piece.box.top + -(-rows.stop // BLOCK) * BLOCK, piece.box.bottom)
            around = piece.box._replace(top=top, bottom=bottom)
            found.append((around, piece.read_scales(around)))
            for copy in self.replicas:
                if not torch.equal(copy.read_scales(around), found[-1][1]):
                    raise self._differs(copy.scale, piece.scale)
        return found

    def _differs(self, copy: TensorInfo, first: TensorInfo) -> CheckpointError:
        return CheckpointError(f"{copy} differs from {shorten(first.name)} in {first.path.name}: two models")

    def read(self, box: Slice2D, dtype: torch.dtype) -> torch.Tensor:
        """Reads a rectangle as numbers of `dtype`: FP8 is dequantised.

        Raises:
            CheckpointError: As by `read_bytes` and `read_scales`, or a number is too large for `dtype`.
        """
        if self.dtype != E4M3:
            out = self.read_bytes(box).view(self.dtype).to(dtype)
        else:
            out = torch.empty(box.shape, dtype=dtype)
            for whole, s in self.read_scales(box):
                part = whole.meet(box)
                rows, cols = part.within(whole)
                left = cols.start // BLOCK  # from where its first block begins
                around = whole._replace(left=whole.left + left * BLOCK, right=part.right)
                q = self.read_bytes(around).view(E4M3)
                values = weight_dequant(q, s[:, left : -(-cols.stop // BLOCK)], dtype=dtype)
                out[part.within(box)] = values[part.within(around)]
        if dtype != self.dtype and not _is_finite(out):
            name = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{self.shards[0].info} has numbers that are too large for {name}")
        return out

    def read_fp8(self, box: Slice2D, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a rectangle as FP8 and its scales: as it is stored, or else quantised now."""
        if self.dtype != E4M3:
            return weight_quant(self.read(box, torch.float32), scale_fmt=scale_fmt)
        return self.read_bytes(box).view(E4M3), self.scales(self.read_scales(box), box)

    def scales(self, parts: list[tuple[Slice2D, torch.Tensor]], box: Slice2D) -> torch.Tensor:
        """`slice_scales`, or an error in its place."""
        found = slice_scales(parts, box)
        if found is None:
            raise CheckpointError(
                f"{self.shards[0].info} {list(self.shape)} cannot be cut or joined so in FP8: a block"
                f" of {BLOCK}×{BLOCK} would need two scales; take another --model-parallel, or --dtype bf16"
            )
        return found


# --- Files -----------------------------------------------------------------------------------------------------------


@contextmanager
def open_regular(
    path: Path, error_type: type[ValueError] = CheckpointError, max_bytes: int | None = None, follow: bool = False
) -> Iterator[FileIO]:
    """Opens a file to read, unbuffered; whatever is read is opened here.

    Args:
        path: The file.
        error_type: What is raised if it cannot be read, also in the body.
        max_bytes: How large it may be.
        follow: Whether it may be a link to anywhere, as a path may that the user gave. One that came with a checkpoint
            may not, see `inside`.

    Raises:
        error_type: It is missing, no regular file (a pipe would block, a device may have no end), or too large.
        CheckpointError: It is a link that leads out of its folder.
    """
    path = Path(path)
    if not follow and path.is_symlink():
        inside(path.parent, path.name)
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | _NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise error_type(f"{path} is no regular file")
            if max_bytes is not None and status.st_size > max_bytes:
                raise error_type(f"{path} has more than {max_bytes >> 20} MB")
            yield file
    except FileNotFoundError:
        raise error_type(f"{path}: no such file") from None
    except OSError as error:
        raise error_type(f"{path} cannot be read: {error.strerror or error}") from None


def read_regular(
    path: Path, max_bytes: int, error_type: type[ValueError] = CheckpointError, follow: bool = False
) -> bytes:
    """Reads a whole file; arguments and errors are those of `open_regular`."""
    with open_regular(path, error_type, max_bytes, follow) as file:
        data = BufferedReader(file).read(max_bytes + 1) or b""  # /proc has files of size 0 with something in them
    if len(data) > max_bytes:
        raise error_type(f"{path} has more than {max_bytes >> 20} MB")
    return data


def open_append(path: Path, folder_fd: int | None = None) -> FileIO:
    """Opens a file to append to, unbuffered, and makes it if there is none; a link is not followed.

    Args:
        path: The file.
        folder_fd: A descriptor of its folder, if that is held open; see `RunFolder`.

    Raises:
        CheckpointError: It is no regular file, or cannot be written.
    """
    opener = lambda name, flags: os.open(name, flags | _NOFOLLOW | _NONBLOCK, 0o666, dir_fd=folder_fd)  # noqa: E731
    with reporting(path):
        try:
            file = open(path if folder_fd is None else path.name, "ab", buffering=0, opener=opener)  # noqa: SIM115
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a pipe or socket, a folder
                raise CheckpointError(f"{path} is no regular file; move it elsewhere") from None
            raise
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise CheckpointError(f"{path} is no regular file; move it elsewhere")
    return file


def replace_file(path: Path, data: bytes, folder_fd: int | None = None) -> None:
    """Writes a file so that a crash leaves the old one or the new one; links under its names are not followed.

    Args:
        path: The file.
        data: What will be in it.
        folder_fd: A descriptor of its folder, if that is held open; see `RunFolder`.

    Raises:
        CheckpointError: It cannot be written.
    """
    with reporting(path), ExitStack() as stack:
        if folder_fd is None and _HAS_DIR_FD:
            folder_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder_fd)
        temporary, final = path.with_name(f".{path.name}.tmp"), path
        if folder_fd is not None:
            temporary, final = Path(temporary.name), Path(path.name)
        with suppress(FileNotFoundError):  # a leftover, or what somebody put there
            os.unlink(temporary, dir_fd=folder_fd)
        try:
            opener = lambda name, flags: os.open(name, flags | _NOFOLLOW, 0o666, dir_fd=folder_fd)  # noqa: E731
            with open(temporary, "xb", opener=opener) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, final, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder_fd)
            raise
        if folder_fd is not None:
            os.fsync(folder_fd)


class RunFolder:
    """A folder into which a process writes for hours: opened once, held, and written by one process at a time.

    Args:
        path: The folder.
        create: Whether to make it, and those above it, where there is none.

    Attributes:
        path: The folder.
        fd: Its descriptor, for `replace_file` and `open_append`; None on Windows, which has none of folders.

    Raises:
        CheckpointError: It is no folder, or cannot be made or opened.
    """

    def __init__(self, path: Path, create: bool = False):
        self.path, self.fd = path, None
        with reporting(path):
            self._is_new = create and not os.path.lexists(path)
            if create:
                path.mkdir(parents=True, exist_ok=True)
            if _HAS_DIR_FD:
                self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def lock(self) -> None:
        """Keeps other processes from locking it until this one closes it or ends, however it ends.

        Raises:
            CheckpointError: Another process has locked it.
        """
        if self.fd is not None and not _flock(self.fd):
            raise CheckpointError(f"{self.path} is being written by another process; wait for it, or end it")

    def check(self) -> None:
        """Checks that the path still leads to the folder that was opened.

        Raises:
            CheckpointError: It does not: what is written now would not be found with the rest.
        """
        try:
            found = os.stat(self.path)
            is_same = stat.S_ISDIR(found.st_mode) if self.fd is None else os.path.samestat(found, os.fstat(self.fd))
        except OSError:
            is_same = False
        if not is_same:
            raise CheckpointError(
                f"{self.path} is not the folder any more in which this run began: it was renamed, removed or "
                "unmounted; put it back and go on with --resume"
            )

    def close(self) -> None:
        """Releases it; a folder that was made and never filled is removed."""
        if self._is_new:
            with suppress(OSError, CheckpointError):
                self.check()
                self.path.rmdir()
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _flock(descriptor: int) -> bool:
    """Takes the lock of an open file, which the system releases when the process ends; False: another has it."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # not all network filesystems have locks
            pass
    return True


# --- Folders and JSON ------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the file in front of what a ConfigError says, which may quote any length of that file."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        raise ConfigError(f"{path}: {text if len(text) < 500 else text[:500] + '…'}") from None


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turns a failing write into a CheckpointError: `path`, the file in it if that is known, and a remedy."""
    try:
        yield
    except OSError as error:
        name = "" if error.filename is None or str(error.filename) == str(path) else f" ({shorten(error.filename)})"
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        reason = error.strerror or str(error) or type(error).__name__
        raise CheckpointError(f"cannot write {path}: {reason}{name}{remedy}") from None


def temporary_path(path: Path) -> Path:
    """The name under which a folder is filled, beside its own."""
    return path.with_name(f".{path.name}.tmp")


def final_path(temporary: Path) -> Path:
    """The name that a folder with a temporary one is going to have."""
    return temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))


def resolved(path: Path) -> Path:
    """The path with all links followed; those that lead to themselves are an error."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} leads nowhere: {error}") from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that becomes `path` at the end; after an error nothing of it remains.

    Raises:
        CheckpointError: `path` is more than an empty folder, another process is making it, or it cannot be written.
    """
    if path.name in ("", ".."):
        raise CheckpointError(f"{str(path)!r} is no name for a new folder; choose a path that does not exist")
    with reporting(path), _parents(path), _locked(path) as is_ours:
        if path.is_symlink() or path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is no empty folder; choose a path that does not exist")
        temporary = temporary_path(path)
        if is_ours:
            shutil.rmtree(temporary, ignore_errors=True)
        elif os.path.lexists(temporary):
            raise CheckpointError(f"{temporary} is where {path} would be made, and is not ours; move it elsewhere")
        temporary.mkdir()
        try:
            yield temporary
            for file in temporary.iterdir():
                fsync(file)
            fsync(temporary)
            if path.exists():  # an empty folder, which Windows would not replace
                path.rmdir()
            temporary.rename(path)
            fsync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_leftover(path: Path) -> None:
    """Removes what a process that died left of `new_folder(path)`; what one is still filling stays."""
    with suppress(CheckpointError, OSError), _locked(path):
        shutil.rmtree(temporary_path(path), ignore_errors=True)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Makes the folders above a path; after an error those are gone again."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds the lock for making `path`; yields whether one who is dead now had left it, and so a temporary folder."""
    lock = path.with_name(f".{path.name}.lock")
    while True:
        is_left = os.path.lexists(lock)
        with open_append(lock) as file:
            held = os.fstat(file.fileno())
            if held.st_size:
                raise CheckpointError(f"{lock} is in the way of making {path}; move it elsewhere")
            if not _flock(file.fileno()):
                raise CheckpointError(f"{path} is being written by another process; wait for it")
            try:
                if not os.path.samestat(held, os.stat(lock, follow_symlinks=False)):
                    continue
            except FileNotFoundError:  # the process that had it has just finished, and removed it
                continue
            try:
                yield is_left
            finally:
                if fcntl is None:  # what is open cannot be removed there
                    file.close()
                lock.unlink(missing_ok=True)
            return


def fsync(path: Path) -> None:
    """Forces a file or a folder's infos to disk; Windows lets neither be opened for that."""
    if os.name != "nt":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, once it is checked that it is no link to elsewhere.

    Raises:
        CheckpointError: It is one, and not just to the blobs beside the snapshot in a cache of Hugging Face's hub.
    """
    home, target = resolved(folder), resolved(folder / name)
    if target.parent not in (home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])):
        raise CheckpointError(f"{folder / name} is a link that leads out of the folder, to {target}")
    return folder / name


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes an object as a JSON file."""
    path.write_bytes(_json(value))


def replace_json(path: Path, value: dict[str, Any], folder_fd: int | None = None) -> None:
    """Writes a JSON file with `replace_file`."""
    replace_file(path, _json(value), folder_fd)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def read_json(path: Path, error_type: type[ValueError], follow: bool = False) -> dict[str, Any]:
    """Reads a JSON file that holds an object, in which no key is twice and all numbers are finite.

    Raises:
        error_type: It is none; the message names the file.
        CheckpointError: It is a link that leads out of its folder, and `follow` is not set.
    """
    data = read_regular(path, MAX_JSON_BYTES, error_type, follow)
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise error_type(f"{path} is not readable as JSON: {shorten(error)}") from None
    if not isinstance(value, dict):
        raise error_type(f"{path} must hold a JSON object, got {type(value).__name__}")
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [x for outer in level for x in _members(outer)]
        if not level:
            return value
    raise error_type(f"{path} has objects or lists in each other, more than {MAX_JSON_DEPTH} deep")


def _members(value: Any) -> Iterable[Any]:
    """What is directly in an object or list of JSON; nothing in anything else."""
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shorten(text)} is no finite number")
    return number
