"""How busy this machine is: CPU, memory, disk, network and NVIDIA GPUs.

The names and units are those of MLflow's own monitors (``mlflow.system_metrics``; megabytes are 1e6 bytes),
so that its page shows them under "System metrics". GPUs are read through ``nvidia-smi``, which is there
wherever the driver is; neither torch nor a library of the vendor is needed.
"""

import os
import shutil
import subprocess
from pathlib import Path

SMI_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "enforced.power.limit")
MIB_MB = 1.048576  # nvidia-smi counts in MiB
SMI_TIMEOUT_S = 10.0


class Sampler:
    """Call it for one sample: CPU load since the call before, network since it was made, the rest as it is."""

    def __init__(self, folder: Path) -> None:
        import psutil

        self._folder = folder  # its file system is the one that training fills
        self._psutil = psutil
        self._network = psutil.net_io_counters()
        self._smi = shutil.which("nvidia-smi")
        psutil.cpu_percent()

    def __call__(self) -> dict[str, float]:
        """Metrics by name, ``system/`` in front. What cannot be read is left out."""
        memory = self._psutil.virtual_memory()
        disk = self._psutil.disk_usage(os.fspath(self._folder))
        sample = {
            "cpu_utilization_percentage": self._psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.used / memory.total * 100,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if self._network:
            now = self._psutil.net_io_counters()
            sample["network_receive_megabytes"] = (now.bytes_recv - self._network.bytes_recv) / 1e6
            sample["network_transmit_megabytes"] = (now.bytes_sent - self._network.bytes_sent) / 1e6
        if self._smi:
            sample |= read_gpus(self._smi)
        return {f"system/{name}": round(value, 1) for name, value in sample.items()}


def read_gpus(smi: str) -> dict[str, float]:
    """Load, memory and power of every GPU of this node; empty where the driver does not answer."""
    query = [smi, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_gpus(answer.stdout)


def parse_gpus(text: str) -> dict[str, float]:
    """Metrics from lines of ``SMI_FIELDS``. A value the card does not report reads ``[N/A]``, and is left out."""
    sample: dict[str, float] = {}
    for line in text.splitlines():
        values = [_number(v) for v in line.split(",")]
        if len(values) != len(SMI_FIELDS) or values[0] is None:
            continue
        index, load, used, total, power, limit = values
        gpu = {
            "utilization_percentage": load,
            "memory_usage_megabytes": used and used * MIB_MB,
            "memory_usage_percentage": used and total and used / total * 100,
            "power_usage_watts": power,
            "power_usage_percentage": power and limit and power / limit * 100,
        }
        sample |= {f"gpu_{index:.0f}_{name}": v for name, v in gpu.items() if v is not None}
    return sample


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
