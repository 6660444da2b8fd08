"""The machines of a run, and how fast their parts are: numbers that somebody measured or published, or that are assumed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

KINDS = ("vendor", "measured", "assumption")


@dataclass(frozen=True)
class Rate:
    """One number of ``hydra_configs/rates/``.

    Attributes:
        value: in SI units.
        kind: "vendor" (data sheet), "measured" (by the source named), or "assumption" (the source says why).
        source: where the number is from.
    """

    value: float
    kind: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rates: kind = {self.kind!r}: must be one of {', '.join(KINDS)}")
        if not self.value >= 0:
            raise ValueError(f"rates: value = {self.value}: must be at least 0")


@dataclass(frozen=True)
class Device:
    """One accelerator, its links, and what a cluster of them is known for. FLOP/s, bytes, bytes/s, seconds.

    Attributes:
        memory: bytes of one device; reserve: of these, what the driver, the communicators and the allocator's gaps take.
        peak: dense bf16, the denominator of MFU.
        gemm, grouped_gemm: bf16 products of projections and head, and of the experts. fp32_gemm: of the router.
        fp8_gemm, fp8_wgrad: FP8 products of the experts: forward and gradient by the input, and gradient by the weights.
        attention_forward, attention_backward: causal, the backward counted as 2.5 forwards' FLOPs, as its benches do.
        hbm: memory bandwidth that element-wise kernels reach.
        nvlink, network: bytes/s that one device sends within and out of its node.
        nvlink_latency, network_latency: of one collective.
        host: time a layer's launches and waits add to a pass of it.
        mtbf: mean time between failures of one device (its share of node and network failures included).
        storage_write: bytes/s of checkpoint that one device's share of the storage takes; restart: seconds from a failure to the next step.
    """

    memory: Rate
    reserve: Rate
    peak: Rate
    gemm: Rate
    grouped_gemm: Rate
    fp32_gemm: Rate
    fp8_gemm: Rate
    fp8_wgrad: Rate
    attention_forward: Rate
    attention_backward: Rate
    hbm: Rate
    nvlink: Rate
    network: Rate
    nvlink_latency: Rate
    network_latency: Rate
    host: Rate
    mtbf: Rate
    storage_write: Rate
    restart: Rate

    @classmethod
    def from_dict(cls, name: str, values: dict[str, Any]) -> Device:
        """Of plain nested dictionaries.

        Raises:
            ValueError: an unknown or missing key, or a value that is no rate, naming it.
        """
        known, rate_fields = [f.name for f in fields(cls)], {f.name for f in fields(Rate)}
        for field in values:
            if field not in known:
                raise ValueError(f"rates.{name}.{field}: unknown key; known are {', '.join(known)}")
        rates = {}
        for field in known:
            given = values.get(field)
            if not isinstance(given, dict) or set(given) != rate_fields:
                raise ValueError(f"rates.{name}.{field}: needs exactly value, kind and source")
            try:
                rates[field] = Rate(float(given["value"]), str(given["kind"]), str(given["source"]))
            except (TypeError, ValueError) as error:
                raise ValueError(f"rates.{name}.{field}: {error}") from None
        return cls(**rates)


@dataclass(frozen=True)
class ClusterConfig:
    """How many machines of which device.

    Attributes:
        nodes: machines; gpus_per_node: devices of each, joined by NVLink (ranks of a CPU: by memory).
        device: a key of ``hydra_configs/rates/``.
        runs_on: "cuda" or "cpu": which kernels run, and so what they keep.
    """

    nodes: int
    gpus_per_node: int
    device: str
    runs_on: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name} = {getattr(self, name)}: must be at least 1")
        if self.runs_on not in ("cuda", "cpu"):
            raise ValueError(f"cluster.runs_on = {self.runs_on!r}: must be cuda or cpu")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def per_node(self, size: int, stride: int) -> int:
        """Of ``size`` ranks that lie ``stride`` apart, how many share a node."""
        return max(1, min(size, self.gpus_per_node // stride))
