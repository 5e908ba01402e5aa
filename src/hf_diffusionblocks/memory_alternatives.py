"""What a user would pick instead of blocks, or beside them, in bytes for the user's own model.

Each way to save memory, alone and, where they combine, with one block of B. What this library does is counted, by the
same counts as a plan's other rows (``memory_counting``); of other methods the weights, gradients and moments are
their papers' formulas for the model's own shapes, named in the row, and the activations are counted. An average of the
weights is left out: every row that trains all weights would have it on top, with as many bytes as weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from .training.optimizers import state_bytes

DEVICES = 8  # of FSDP2
LORA_RANK = 16
LISA_LAYERS = 2  # trained at a time, besides embeddings and head
_NF4_BYTES = (4 + 0.127) / 8  # per weight, with double quantisation (QLoRA, arXiv 2305.14314, section 3)
_COLUMNS = ("weights", "gradients", "moments", "activations")


@dataclass(frozen=True)
class Job:
    """What trains together: the whole model, or one block of it.

    Attributes:
        name: for the table.
        trained: its parameters, on any device.
        layers: those of each layer.
        matrices: weights of linear maps in layers.
        resident: bytes of weights, buffers included.
        activations: bytes, plain and with checkpointing.
        one_gradient: the most bytes of gradients at a time if each is used and freed as it comes.
        first_layers: bytes of activations if only the first layer, or the first two, of all layers train; None if
            that is not known.
    """

    name: str
    trained: Sequence[Tensor]
    layers: Sequence[Sequence[Tensor]]
    matrices: Sequence[Tensor]
    resident: int
    activations: tuple[int, int]
    one_gradient: int
    first_layers: tuple[int, int] | None = None

    @property
    def size(self) -> int:
        """Bytes of the trained parameters."""
        return _bytes(self.trained)

    @property
    def largest_layer(self) -> Sequence[Tensor]:
        """The layer with the most parameters."""
        return max(self.layers, key=_bytes)

    def moments(self, optim: str) -> int:
        """Bytes of an optimizer's state."""
        return sum(state_bytes(optim, p.shape, p.dtype) for p in self.trained)


@dataclass(frozen=True)
class AlternativeRow:
    """A way to train, in bytes.

    Attributes:
        method: its name.
        job: the whole model or one of its blocks.
        weights, gradients, moments, activations: bytes on the device.
        ratio: ``total`` over that of end to end.
        bytes_per_parameter: ``total`` over the number of parameters of the whole model.
        trains_all: whether every weight (of the block) is trained freely at some time, not in a low rank.
        devices: how many it needs; the bytes are each one's.
        ours: whether this library does it by its own switches.
        source: where the figures come from.
    """

    method: str
    job: str
    weights: int
    gradients: int
    moments: int
    activations: int
    ratio: float
    bytes_per_parameter: float
    trains_all: bool
    devices: int
    ours: bool
    source: str

    @property
    def total(self) -> int:
        """All kinds together, in bytes."""
        return sum(getattr(self, name) for name in _COLUMNS)

    @property
    def checkpointing(self) -> bool:
        """Whether activations are recomputed."""
        return self.method.endswith(_CHECKPOINTING)

    @property
    def name(self) -> str:
        """Method and job."""
        return f"{self.method}, {self.job}"


Held = tuple[float, float, float]  # weights, gradients, moments


@dataclass(frozen=True)
class _Method:
    name: str
    held: Callable[[Job], Held]
    source: str = "counted"
    with_block: bool = True
    trains_all: bool = True
    devices: int = 1
    ours: bool = False
    partly: int = 0  # layers that train at a time, if fewer than all


def _adam(optim: str, release: bool = False) -> Callable[[Job], Held]:
    return lambda job: (job.resident, job.one_gradient if release else job.size, job.moments(optim))


def _galore(job: Job) -> Held:
    projected = {id(matrix) for matrix in job.matrices}
    moments = 0
    for p in job.trained:
        if id(p) in projected:
            short, long = sorted(p.shape)
            rank = max(1, short // 4)
            moments += (short * rank + 2 * rank * long) * p.dtype.itemsize
        else:
            moments += 2 * p.nbytes
    return job.resident, job.one_gradient, moments


def _badam(job: Job) -> Held:
    active = sum(p.numel() for p in job.largest_layer)
    copy = 4 * active  # its authors' package copies the active layer to float32, even if it is float32 already
    return job.resident + copy, 4 * active, 8 * active


def _lisa(job: Job) -> Held:
    in_layers = {id(p) for layer in job.layers for p in layer}
    active = LISA_LAYERS * _bytes(job.largest_layer) + _bytes(p for p in job.trained if id(p) not in in_layers)
    return job.resident, active, 2 * active


def _lora(job: Job, weight_bytes: float | None = None) -> Held:
    adapters = sum(LORA_RANK * sum(p.shape) * p.dtype.itemsize for p in job.matrices)
    saved = 0 if weight_bytes is None else sum(p.nbytes - weight_bytes * p.numel() for p in job.matrices)
    return job.resident - saved + adapters, adapters, 2 * adapters


def _sharded(job: Job) -> Held:
    gathered = _bytes(job.largest_layer)
    return job.resident / DEVICES + gathered, job.size / DEVICES + gathered, 2 * job.size / DEVICES


_FORMULA = "formula: "
_METHODS = (
    _Method("AdamW", _adam("adamw_torch_fused"), ours=True),
    _Method("AdamW, gradient release", _adam("adamw_torch_fused", True), ours=True),
    _Method("8-bit Adam", _adam("adamw_8bit"), ours=True),
    _Method("8-bit Adam, gradient release", _adam("adamw_8bit", True), ours=True),
    _Method("Adafactor", _adam("adafactor"), ours=True),
    _Method("Adafactor, gradient release", _adam("adafactor", True), ours=True),
    _Method(
        "optimizer on the CPU",
        lambda job: (job.resident, job.size, 0),
        _FORMULA + "P+G+A (torchao CPUOffloadOptimizer)",
    ),
    _Method(
        "optimizer and gradients on the CPU",
        lambda job: (job.resident, job.one_gradient, 0),
        _FORMULA + "P+A and one gradient (torchao CPUOffloadOptimizer)",
    ),
    _Method("GaLore by layer", _galore, _FORMULA + "rank 1/4 of the width (arXiv 2403.03507)"),
    _Method("LOMO", lambda job: (job.resident, job.one_gradient, 0), _FORMULA + "SGD, one gradient (arXiv 2306.09782)"),
    _Method("BAdam", _badam, _FORMULA + "P and 16 bytes x P/L (arXiv 2404.02827)", with_block=False, partly=1),
    _Method(
        "LISA",
        _lisa,
        _FORMULA + f"{LISA_LAYERS} layers and what is in none (arXiv 2403.17919)",
        with_block=False,
        partly=LISA_LAYERS,
    ),
    _Method("LoRA", _lora, _FORMULA + f"rank {LORA_RANK}, linear maps (arXiv 2106.09685)", trains_all=False),
    _Method(
        "QLoRA",
        lambda job: _lora(job, _NF4_BYTES),
        _FORMULA + f"NF4, rank {LORA_RANK} (arXiv 2305.14314)",
        trains_all=False,
    ),
    _Method(
        "FSDP2 / ZeRO-3",
        _sharded,
        _FORMULA + f"4P/{DEVICES}, one layer gathered, on {DEVICES} devices",
        devices=DEVICES,
    ),
)
_CHECKPOINTING = ", checkpointing"
WHOLE = "whole model"


@dataclass(frozen=True)
class Alternatives:
    """The table of alternatives. ``print()`` shows it.

    Attributes:
        rows: each method, alone and with one block; then AdamW with checkpointing; then the best combinations.
        num_parameters: of the whole model.
    """

    rows: tuple[AlternativeRow, ...]
    num_parameters: int

    def least(self, **wanted: Any) -> AlternativeRow:
        """The row on one device that holds the least, of those whose fields have the given values."""
        rows = [r for r in self.rows if r.devices == 1 and all(getattr(r, k) == v for k, v in wanted.items())]
        return min(rows, key=lambda row: row.total)

    @property
    def summary(self) -> str:
        """Which combination needs the least."""
        first, free, ours = self.least(), self.least(trains_all=True), self.least(ours=True)
        parts = [f"Least of all on one device: {_described(first)}."]
        if free != first:
            parts.append(f"Least that is not of a low rank: {_described(free)}.")
        if ours not in (first, free):
            parts.append(f"Least by this library's own switches: {_described(ours)}.")
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Rows (in bytes) and summary, JSON-ready."""
        rows = [asdict(row) | {"name": row.name, "total": row.total} for row in self.rows]
        return {"rows": rows, "num_parameters": self.num_parameters, "summary": self.summary}

    def format(self) -> str:
        """An aligned table, its legend and the summary."""
        block = [row for row in self.rows if row.job != WHOLE and row.method in ("AdamW", "AdamW" + _CHECKPOINTING)]
        plain, lean = (row.total for row in block)
        least = self.least()
        head = ("alternative", *_COLUMNS, "total", "ratio", "B/param", "", "figures")
        table = [head] + [
            (
                row.name,
                *(human(getattr(row, name)) for name in (*_COLUMNS, "total")),
                f"{row.ratio:.3f}",
                f"{row.bytes_per_parameter:.2f}",
                "*" if row == least else "<" if row.total < (lean if row.checkpointing else plain) else "",
                row.source,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(head))]
        lines = [
            "  ".join(
                text.ljust(width) if i in (0, len(head) - 1) else text.rjust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in table
        ]
        legend = (
            f"* the least on one device. < less than AdamW with {block[0].job}, with checkpointing if the row has it.",
            "P, G, A: weights, gradients, activations; L: layers. B/param: bytes per parameter of the whole model.",
            "No average of the weights is in it. Activations are counted; of adapters, without their own.",
        )
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", *legend, "", self.summary])

    __str__ = format


def _described(row: AlternativeRow) -> str:
    return f"{row.name}, {human(row.total)} ({row.ratio:.3f} of end to end)"


def compare(whole: Job, block: Job) -> Alternatives:
    """The table for a model and its block that holds the most."""
    count = sum(p.numel() for p in whole.trained)

    def row(method: _Method, job: Job, checkpointing: bool) -> AlternativeRow:
        weights, gradients, moments = map(round, method.held(job))
        activations = job.activations[checkpointing]
        if method.partly and not checkpointing and job.first_layers is not None:
            activations = job.first_layers[method.partly - 1]
        total = weights + gradients + moments + activations
        return AlternativeRow(
            method=method.name + (_CHECKPOINTING if checkpointing else ""),
            job=job.name,
            weights=weights,
            gradients=gradients,
            moments=moments,
            activations=activations,
            ratio=total / reference if reference else 1.0,
            bytes_per_parameter=total / count,
            trains_all=method.trains_all,
            devices=method.devices,
            ours=method.ours,
            source=method.source,
        )

    reference = 0
    reference = row(_METHODS[0], whole, False).total
    rows = [row(_METHODS[0], job, checkpointing) for checkpointing in (False, True) for job in (whole, block)]
    for method in _METHODS[1:]:
        rows += [row(method, job, False) for job in _jobs(method, whole, block)]
    combined = [row(method, job, True) for method in _METHODS for job in _jobs(method, whole, block)]
    for wanted in _CLASSES:  # the best of each class, with checkpointing on top
        found = [r for r in combined if r.devices == 1 and wanted(r)]
        best = min(found, key=lambda r: r.total)
        if best not in rows:
            rows.append(best)
    return Alternatives(tuple(rows), count)


_CLASSES: tuple[Callable[[AlternativeRow], bool], ...] = (
    lambda row: row.job == WHOLE and row.trains_all,
    lambda row: row.job == WHOLE,
    lambda row: row.ours,
    lambda row: row.trains_all,
    lambda row: True,
)


def _jobs(method: _Method, whole: Job, block: Job) -> Iterator[Job]:
    yield whole
    if method.with_block:
        yield block


def layers_of(module: nn.Module) -> list[nn.Module]:
    """A network's layers: the largest list of modules in it."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return list(max(lists, key=lambda m: _bytes(m.parameters()), default=[]))


def matrices_of(module: nn.Module) -> list[Tensor]:
    """The weights of linear maps in a network's layers."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    found = {id(m.weight): m.weight for top in lists for m in top.modules() if isinstance(m, nn.Linear)}
    return list(found.values())


def _bytes(parameters: Any) -> int:
    return sum(p.nbytes for p in parameters)


def human(size: int) -> str:
    """Bytes in the largest unit of which there is one."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} B"


__all__ = ["AlternativeRow", "Alternatives", "Job", "WHOLE", "compare", "human", "layers_of", "matrices_of"]
