"""Files of a checkpoint: how they are opened and replaced, and tensors read and written slice by slice.

A tensor counts as a matrix here. A file has some of it, a `Slice2D`; with its place in the file that is a `ShardSlice`,
and all of these together are a `ShardedTensor`, which is read a band of about a megabyte at a time, so that memory does
not grow with the checkpoint.

The safetensors library checks headers. Tensors are not read by it, since it maps the file: pages once read count as
memory of the process, and a file that shrinks ends it. They are not written by it either, since `save_file` wants all
tensors of a file in memory at once.

FP8 weights have a scale for each block of 128×128, counted from the corner of the slice that a file has. A slice whose
blocks are not those of the files is exact if none of its blocks needs two different scales, and refused otherwise.

A folder is never seen half-written: it is filled under a temporary name, flushed to disk and renamed. The lock beside
it, released by the system however a process ends, keeps others from filling it too, and marks leftovers as such.
"""

import errno
import fcntl
import json
import math
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from command import shorten
from fp8_ops import BLOCK, E4M3, weight_dequant, weight_quant
from model import ConfigError

BAND_BYTES = 1 << 20  # read of a tensor at a time: much for a disk, little for a cache and for malloc
MAX_JSON_BYTES = 64 << 20  # of a config or an index; that of a trillion parameters has 20
MAX_JSON_DEPTH = 50  # far below what Python can print or walk through by recursion
MAX_DIMS = 8
MAX_HEADER_BYTES = 32 << 20  # a trillion parameters in 400 experts a layer, all in one file, need half of it
# The dtypes of safetensors, in its own order: a file's tensors lie in the opposite one.
# fmt: off
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2, "F8_E4M3": E4M3,
    "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}
# fmt: on
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)  # all widen to float32 exactly
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there, or choose another place")
_REMEDIES |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a place that you may write to")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another model: the message names the file and the remedy."""


# --- Slices ----------------------------------------------------------------------------------------------------------


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
        """The intersection of two slices; None where there is none."""
        top, bottom = max(self.top, other.top), min(self.bottom, other.bottom)
        left, right = max(self.left, other.left), min(self.right, other.right)
        return Slice2D(top, bottom, left, right) if top < bottom and left < right else None

    def within(self, outer: "Slice2D") -> tuple[slice, slice]:
        """Its rows and columns, counted from the corner of a slice around it."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return rows, slice(self.left - outer.left, self.right - outer.left)


def slice_scales(shards: list[tuple[Slice2D, torch.Tensor]], box: Slice2D) -> torch.Tensor | None:
    """Finds the scales of a slice of FP8 weights which stay as they are while their blocks become others.

    `shards` are slices side by side, or one above the other, with their scales (⌈rows/128⌉, ⌈columns/128⌉), and `box`
    is anywhere in them. Returns its scales, or None where a block would need two different ones.
    """
    shards = sorted(shards, key=lambda item: item[0])
    corner = shards[0][0]
    across = 0 if all(shard.left == corner.left for shard, _ in shards) else 1  # dimension in which they are joined
    scales = torch.cat([s for _, s in shards], dim=across)
    rows_and_columns = []
    for dim, start in enumerate((box.top - corner.top, box.left - corner.left)):
        blocks, first = [], 0  # of each row, or column, the block that it is in
        for shard, _ in shards if dim == across else shards[:1]:
            blocks.append(torch.arange(shard.shape[dim]) // BLOCK + first)
            first += -(-shard.shape[dim] // BLOCK)
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
    """Whether each block of a slice lies within one block of the full matrix."""
    ends = ((box.top, box.bottom), (box.left, box.right))
    return all(start % BLOCK == 0 or start // BLOCK == (end - 1) // BLOCK for start, end in ends)


# --- safetensors -----------------------------------------------------------------------------------------------------


class TensorInfo(NamedTuple):
    """A tensor in a file: its name, dtype and shape, and the byte of the file where it starts."""

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
        """Reads the tensor, whose numbers must be finite."""
        out = torch.empty(self.nbytes, dtype=torch.uint8)
        with open_regular(self.path) as file:
            _fill(file, self.offset, out)
        out = out.view(self.dtype).view(self.shape)
        self.check_finite(out)
        return out

    def check_finite(self, data: torch.Tensor) -> None:
        """Raises a CheckpointError if `data`, some of the tensor, has NaN or infinity."""
        if not _is_finite(data):
            raise CheckpointError(
                f"{self} holds numbers that are not finite, NaN or infinity; take an intact checkpoint"
            )


def _is_finite(data: torch.Tensor) -> bool:
    """Whether all numbers are finite, at a small fraction of the cost of reading them."""
    if not data.numel() or not data.dtype.is_floating_point:
        return True
    if data.dtype == E4M3:  # it has no infinity, and NaN is 0x7f or 0xff
        return data.view(torch.uint8).max().item() < 0xFF and data.view(torch.int8).max().item() < 0x7F
    if data.itemsize == 1:
        data = data.float()
    # a sum takes a thirtieth of the time, but may overflow
    return math.isfinite(data.sum().item()) or bool(data.isfinite().all())


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads the header of a safetensors file: its tensors by name, not yet read.

    Raises:
        CheckpointError: The file is missing, truncated or no safetensors, or the header contradicts itself or the file.
    """
    header, start = _read_raw_header(path)
    header.pop("__metadata__", None)
    infos = {}
    for name, value in header.items():
        dtype = value["dtype"] if isinstance(value, dict) else value  # safetensors takes lists, and objects for dtypes
        if not isinstance(dtype, str) or dtype not in DTYPES or len(value["shape"]) > MAX_DIMS:
            what = f"is {shorten(dtype)} or has more than {MAX_DIMS} dimensions, which is not supported"
            raise CheckpointError(f"{path}: tensor {shorten(name)} {what}")
        offset = start + value["data_offsets"][0]
        infos[name] = TensorInfo(path, name, DTYPES[dtype], tuple(value["shape"]), offset)
    return infos


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the metadata in the header of a safetensors file: of the library that it is for, among others."""
    return _read_raw_header(path)[0].get("__metadata__") or {}


def _read_raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON object at the start of a safetensors file, which safetensors has checked, and the byte where it ends."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path} is no safetensors file: a header of {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        with safe_open(path, "numpy"):  # refuses all else that is wrong: types, overflows, gaps, sizes
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
    view, done = memoryview(out.reshape(-1).numpy()), 0  # type: ignore[arg-type]
    file.seek(offset)
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise CheckpointError(f"{file.name} ends before byte {offset + len(view)}: it was truncated meanwhile")
        done += count


def write_all(file: Any, tensor: torch.Tensor) -> None:
    """Writes a tensor's bytes to an unbuffered file, which may take some of them at a time."""
    view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:  # write() leaves the file's name out of it
        raise OSError(error.errno, error.strerror, file.name) from None


class SafetensorsWriter:
    """A safetensors file to be written, laid out as safetensors itself does it.

    `tensors` has the dtype and shape of each tensor, `metadata` its entries beside "format", which transformers reads.
    Attributes: `infos`, the tensors and their places; `header`, the bytes before them; `size`, bytes in all.
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
        """Creates the file, with room for the tensors behind its header."""
        with open(folder / self.name, "xb") as file:
            file.write(self.header)
            file.truncate(self.size)


# --- Sharded tensors -------------------------------------------------------------------------------------------------


class ShardSlice(NamedTuple):
    """A slice of a tensor in a file, and its scales if it is FP8."""

    info: TensorInfo
    box: Slice2D
    scale: TensorInfo | None = None

    def read(self, box: Slice2D, out: torch.Tensor) -> None:
        """Reads some of it, the slice `box` of the full tensor, as it is stored, into uint8 (rows, bytes of a row)."""
        size = self.info.dtype.itemsize
        rows, cols = box.within(self.box)
        stride = self.box.shape[1] * size
        with open_regular(self.info.path) as file:
            if out.is_contiguous() and out.shape[1] == stride:
                _fill(file, self.info.offset + rows.start * stride, out)
            else:  # of each row only these columns, to their place
                for i, row in enumerate(out, rows.start):
                    _fill(file, self.info.offset + i * stride + cols.start * size, row)

    def read_scales(self, around: Slice2D) -> torch.Tensor:
        """Reads and checks the scales of a band of full rows, from the first row of a block to the last of one."""
        rows, cols = around.within(self.box)[0], self.scale.shape[1]
        first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
        offset = self.scale.offset + first * cols * self.scale.dtype.itemsize
        s = self.scale._replace(shape=(last - first, cols), offset=offset).read().float()
        smallest = s.min().item() if s.numel() else 1
        if smallest < 0:
            raise CheckpointError(f"{self.scale} has scales that are not all finite and positive")
        if smallest == 0:
            self._check_zeros(around, s)
        return s

    def _check_zeros(self, around: Slice2D, s: torch.Tensor) -> None:
        """Refuses scales of zero, but for those of blocks that are all zero, as some writers have them."""
        for i in (s == 0).any(1).nonzero().flatten().tolist():
            top = around.top + i * BLOCK
            band = around._replace(top=top, bottom=min(top + BLOCK, around.bottom))
            self.read(band, q := torch.empty(band.shape, dtype=torch.uint8))
            if ((q & 0x7F != 0) & (s[i] == 0).repeat_interleave(BLOCK)[: band.shape[1]]).any():
                raise CheckpointError(f"{self.scale} has a scale of zero for weights that are not zero")


def shard_slice(info: TensorInfo, box: Slice2D, scale: TensorInfo | None) -> ShardSlice:
    """Puts a weight and its scales together; a CheckpointError if it is FP8 and they are missing or do not fit."""
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
    """A tensor in one file or several."""

    name: str  # in the files
    shape: tuple[int, ...]  # of the full tensor
    dtype: torch.dtype = torch.float32  # as it is stored
    shards: list[ShardSlice] = field(default_factory=list)  # which cover it
    replicas: list[ShardSlice] = field(default_factory=list)  # equal copies of it: one a rank, or one an MTP module

    @property
    def box(self) -> Slice2D:
        shape = (1, *self.shape)
        return Slice2D(0, math.prod(shape[:-1]), 0, shape[-1])

    def bands(self, box: Slice2D, step: int = 1) -> Iterator[Slice2D]:
        """Divides a slice into bands to be read at a time: full rows, a multiple of `step`.

        A row longer than BAND_BYTES, as that of a large vector, is divided too, at multiples of 128 columns.
        """
        if 0 in box.shape:
            return
        width, size = box.shape[1], self.dtype.itemsize
        height = max(step, BAND_BYTES // (width * size) // step * step)
        if width * size > BAND_BYTES:
            width = max(BLOCK, BAND_BYTES // (min(height, box.shape[0]) * size) // BLOCK * BLOCK)
        for top in range(box.top, box.bottom, height):
            for left in range(box.left, box.right, width):
                yield Slice2D(top, min(top + height, box.bottom), left, min(left + width, box.right))

    def read_bytes(self, box: Slice2D) -> torch.Tensor:
        """Reads a slice as it is stored, uint8 (rows, bytes of a row); refuses NaN, infinity, unequal replicas."""
        out = self._read_unchecked(box)
        if not _is_finite(numbers := out.view(self.dtype)):
            for shard in self.shards:
                if (overlap := shard.box.meet(box)) is not None:
                    shard.info.check_finite(numbers[overlap.within(box)])
        return out

    def _read_unchecked(self, box: Slice2D) -> torch.Tensor:
        """`read_bytes` of numbers that need not be finite."""
        size = self.dtype.itemsize
        out = torch.empty(box.shape[0], box.shape[1] * size, dtype=torch.uint8)
        for shard in self.shards:
            if (overlap := shard.box.meet(box)) is not None:
                rows, cols = overlap.within(box)
                shard.read(overlap, out[rows, cols.start * size : cols.stop * size])
        for replica in self.replicas:
            replica.read(box, other := torch.empty_like(out))
            if not torch.equal(other, out):
                raise self._differs(replica.info, self.shards[0].info)
        return out

    def read_scales(self, box: Slice2D | None = None) -> list[tuple[Slice2D, torch.Tensor]]:
        """Reads the scales of a slice of FP8 weights, by default of all: finite, positive, equal in replicas.

        Returns for each shard that overlaps the slice: the rows of all blocks that it touches there, and their scales.
        """
        found = []
        for shard in self.shards:
            if (overlap := shard.box.meet(box or self.box)) is None:
                continue
            rows = overlap.within(shard.box)[0]
            top = shard.box.top + rows.start // BLOCK * BLOCK
            bottom = min(shard.box.top + -(-rows.stop // BLOCK) * BLOCK, shard.box.bottom)
            around = shard.box._replace(top=top, bottom=bottom)
            found.append((around, shard.read_scales(around)))
            for replica in self.replicas:
                if not torch.equal(replica.read_scales(around), found[-1][1]):
                    raise self._differs(replica.scale, shard.scale)
        return found

    def _differs(self, replica: TensorInfo, first: TensorInfo) -> CheckpointError:
        return CheckpointError(f"{replica} differs from {shorten(first.name)} in {first.path.name}: two models")

    def read(self, box: Slice2D, dtype: torch.dtype) -> torch.Tensor:
        """Reads a slice as numbers of `dtype`, which must be large enough for them: FP8 is dequantised."""
        if self.dtype != E4M3:
            out = self._read_unchecked(box).view(self.dtype).to(dtype)
        else:
            out = torch.empty(box.shape, dtype=dtype)
            for rows, s in self.read_scales(box):
                overlap = rows.meet(box)
                cols = overlap.within(rows)[1]
                left = cols.start // BLOCK  # its first block
                around = rows._replace(left=rows.left + left * BLOCK, right=overlap.right)
                q = self._read_unchecked(around).view(E4M3)
                values = weight_dequant(q, s[:, left : -(-cols.stop // BLOCK)], dtype=dtype)
                out[overlap.within(box)] = values[overlap.within(around)]
        if not _is_finite(out):
            self.read_bytes(box)  # refuses what is not finite as it is stored
            name = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{self.shards[0].info} has numbers that are too large for {name}")
        return out

    def read_fp8(self, box: Slice2D, scale_fmt: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads a slice as FP8, and its scales: as it is stored, or else quantised now."""
        if self.dtype != E4M3:
            return weight_quant(self.read(box, torch.float32), scale_fmt=scale_fmt)
        return self.read_bytes(box).view(E4M3), self.scales(self.read_scales(box), box)

    def scales(self, shards: list[tuple[Slice2D, torch.Tensor]], box: Slice2D) -> torch.Tensor:
        """Returns `slice_scales`; raises a CheckpointError where a block would need two scales."""
        found = slice_scales(shards, box)
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
    """Opens a file to read, unbuffered; all files of checkpoints and configs are opened here.

    A failure raises `error_type`, also in the body: a file that is missing, has more than `max_bytes`, or is no regular
    one, since a pipe would block and a device may have no end. A link that leads out of its folder is a CheckpointError
    unless `follow` is set: for paths that the user gave, not for files of a checkpoint.
    """
    if not follow and path.is_symlink():
        inside(path.parent, path.name)
    try:
        with open(path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
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
    """Reads a file; arguments and errors are those of `open_regular`."""
    with open_regular(path, error_type, max_bytes, follow) as file:
        data = BufferedReader(file).read(max_bytes + 1) or b""  # /proc has files of size 0 with something in them
    if len(data) > max_bytes:
        raise error_type(f"{path} has more than {max_bytes >> 20} MB")
    return data


def open_append(path: Path, folder_fd: int | None = None) -> FileIO:
    """Opens a file to append to, unbuffered, and creates it if there is none; a link is not followed.

    `folder_fd` is a descriptor of its folder, if that is held open. Raises a CheckpointError if it cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with reporting(path):
        try:
            fd = os.open(path if folder_fd is None else path.name, flags, 0o666, dir_fd=folder_fd)
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return open(fd, "ab", buffering=0)
            os.close(fd)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):  # a link, a pipe or socket, a folder
                raise
        raise CheckpointError(f"{path} is no regular file; move it elsewhere")


def write_json(path: Path, value: dict[str, Any], folder_fd: int | None = None) -> None:
    """Writes an object as a JSON file, so that a crash leaves the old one or the new one; links are not followed.

    `folder_fd` is a descriptor of its folder, if that is held open. Raises a CheckpointError if it cannot be written.
    """
    with reporting(path), ExitStack() as stack:
        if folder_fd is None:
            folder_fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, folder_fd)
        temporary = f".{path.name}.tmp"
        with suppress(FileNotFoundError):  # a leftover, or a link that would be followed
            os.unlink(temporary, dir_fd=folder_fd)
        try:
            with open(temporary, "xb", opener=partial(os.open, mode=0o666, dir_fd=folder_fd)) as file:
                file.write((json.dumps(value, indent=2) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path.name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder_fd)
            raise
        os.fsync(folder_fd)


def lock(descriptor: int, opened: Path, path: Path) -> None:
    """Locks an open file or folder until it is closed or the process ends, by whatever means.

    Raises:
        CheckpointError: Another process has locked it, or replaced what was opened, and so is writing `path`.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = leads_to(opened, descriptor)
    except BlockingIOError:
        is_ours = False
    except OSError:  # not all network filesystems have locks
        is_ours = True
    if not is_ours:
        raise CheckpointError(f"{path} is being written by another process; wait for it, or end it")


def leads_to(path: Path, descriptor: int) -> bool:
    """Whether a path still leads to the file or folder that was opened."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


# --- Folders and JSON ------------------------------------------------------------------------------------------------


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the file's name in front of a ConfigError's message, which may quote any length of that file."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {shorten(error, 500)}") from None


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turns a failing write into a CheckpointError: `path`, the file in it if that is known, and a remedy."""
    try:
        yield
    except OSError as error:
        file = error.filename2 or error.filename  # of a copy that fails, the second is what was written
        name = "" if file is None or str(file) == str(path) else f" ({shorten(file)})"
        remedy = f"; {_REMEDIES[error.errno]}" if error.errno in _REMEDIES else ""
        reason = error.strerror or str(error) or type(error).__name__
        raise CheckpointError(f"cannot write {path}: {reason}{name}{remedy}") from None


def temporary_path(path: Path) -> Path:
    """The name under which a folder is filled, beside its own."""
    return path.with_name(f".{path.name}.tmp")


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
        CheckpointError: `path` is more than an empty folder, is being filled by another process, or cannot be written.
    """
    if path.name in ("", ".."):
        raise CheckpointError(f"{str(path)!r} is no name for a new folder; choose a path that does not exist")
    with reporting(path), _parents(path), _locked(path) as is_ours:
        if path.is_symlink() or path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise CheckpointError(f"{path} exists and is no empty folder; choose a path that does not exist")
        temporary = temporary_path(path)
        if is_ours:
            remove_folder(temporary)
        elif os.path.lexists(temporary):
            raise CheckpointError(f"{temporary} is where {path} would be made, and is not ours; move it elsewhere")
        temporary.mkdir()
        try:
            yield temporary
            for file in (*temporary.iterdir(), temporary):
                _fsync(file)
            temporary.rename(path)  # which replaces an empty folder
            _fsync(path.parent)
        except BaseException:
            remove_folder(temporary)
            raise


def remove_folder(path: Path) -> None:
    """Removes a folder and all in it. What is no folder stays: `shutil.rmtree` opens it, and waits at a pipe."""
    with suppress(OSError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)


def remove_leftover(path: Path) -> None:
    """Removes the temporary folder that a killed process left of `new_folder(path)`; one that is being filled stays."""
    with suppress(CheckpointError, OSError), _locked(path):
        remove_folder(temporary_path(path))


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Creates the folders above a path; after an error they are removed again."""
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
    """Holds the lock of `path`; yields whether a killed process has left it, and so perhaps a temporary folder."""
    lock_path = path.with_name(f".{path.name}.lock")
    is_left = os.path.lexists(lock_path)
    with open_append(lock_path) as file:
        if os.fstat(file.fileno()).st_size:
            raise CheckpointError(f"{lock_path} is in the way of making {path}; move it elsewhere")
        lock(file.fileno(), lock_path, path)
        try:
            yield is_left
        finally:
            lock_path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    """Forces a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder, after a check that it is no link to another place.

    Raises:
        CheckpointError: It is one, and not just to the blobs beside the snapshot in a cache of Hugging Face's hub.
    """
    home, target = resolved(folder), resolved(folder / name)
    if target.parent not in (home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])):
        raise CheckpointError(f"{folder / name} is a link that leads out of the folder, to {target}")
    return folder / name


def read_json(path: Path, error_type: type[ValueError], follow: bool = False) -> dict[str, Any]:
    """Reads a JSON file with an object in it, in which no key is twice and all numbers are finite.

    Raises:
        error_type: It is not such a file; the message names it.
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
        level = [x for v in level if isinstance(v, (dict, list)) for x in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise error_type(f"{path} is nested too deeply: more than {MAX_JSON_DEPTH} objects or lists in each other")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shorten(text)} is no finite number")
    return number
