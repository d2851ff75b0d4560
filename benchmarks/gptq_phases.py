"""Where the seconds and the memory of a GPTQ run go, phase by phase.

    python benchmarks/gptq_phases.py model=hf model.path=<folder> calibration=local calibration.path=<text> ...

Arguments are overrides as for ``qexp``; defaults: method=gptq bits=w4a16g128. The run starts fresh, in a folder of its
own; the float model's results come from the cache if they are there. Prints a Markdown table; asserts nothing.
"""

from __future__ import annotations

import sys
import tempfile

from bench import composed, machine, setup_of, table
from meter import Meter

from qexp.core.errors import UserError
from qexp.launch import begin
from qexp.run import measure

DEFAULTS = ["method=gptq", "bits=w4a16g128", "tracking=none"]
# Names as their callers look them up; the innermost running phase gets the time.
PHASES = {
    "load model": ["qexp.models.load:ModelSource.load"],
    "calibration text": ["qexp.data.calibration:Calibration.load"],
    "evaluation text": ["qexp.eval.evaluation:Evaluation.sets"],
    "float baseline": ["qexp.eval.evaluation:Evaluation.baseline"],
    "transforms": ["qexp.engine.transforming:transform_model", "qexp.engine.blocks:transform_block"],
    "streams: forward": ["qexp.engine.blocks:embed", "qexp.engine.blocks:advance"],
    "statistics: forward": ["qexp.engine.blocks:observe", "qexp.engine.transforming:observe"],
    "statistics: sums": ["qexp.engine.capture:_Sums.__call__"],
    "solve: report and install": ["qexp.engine.blocks:solve_group"],
    "solve: factor H": ["qexp.stages.solver.gptq:unit_factor"],
    "solve: column sweep": ["qexp.stages.solver.gptq:Gptq.solve"],
    "solve: fit grids": ["qexp.stages.grid.integer:Integer.fit"],
    "store": ["qexp.engine.blocks:pack_block", "qexp.engine.store:save_file", "qexp.engine.blocks:install"],
    "activation surfaces": ["qexp.engine.diagnostics:Surfaces._look"],
    "evaluate": ["qexp.eval.evaluation:Evaluation.run"],
}


def main(overrides: list[str]) -> None:
    """Run once and print the table."""
    meter = Meter()
    for phase, places in PHASES.items():
        for place in places:
            meter.wrap(place, phase)
    with tempfile.TemporaryDirectory() as folder:
        config = composed([*DEFAULTS, *overrides, f"output_dir={folder}"])
        setup = setup_of(config)
        with meter.running():
            measured = measure(setup, begin(setup))
    write = sys.stdout.write
    write(f"{machine()}\noverrides: {' '.join([*DEFAULTS, *overrides])}\n\n")
    write(phases_table(meter) + "\n\n")
    cost = ", ".join(f"{key} {value:.1f}" for key, value in measured["cost"].items())
    found = {key: value for key, value in measured["metrics"].items() if "perplexity" in key and "ci95" not in key}
    write(f"{cost}\n{', '.join(f'{key} {value:.3f}' for key, value in found.items())}\n")


def phases_table(meter: Meter) -> str:
    """Return phases in the order of the run, with their share of the CPU seconds."""
    total = sum(meter.cpu.values())
    rows = [
        [
            phase,
            f"{meter.wall[phase]:.1f}",
            f"{meter.cpu[phase]:.1f}",
            f"{100 * meter.cpu[phase] / total:.0f} %",
            f"{meter.peak.get(phase, 0) / 2**20:.0f}",
        ]
        for phase in [*PHASES, "other"]
        if meter.wall[phase] > 0
    ]
    rows.append(
        ["sum", f"{sum(meter.wall.values()):.1f}", f"{total:.1f}", "", f"{max(meter.peak.values()) / 2**20:.0f}"]
    )
    return table(["phase", "wall s", "CPU s", "of CPU", "peak RSS MiB"], rows)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"gptq_phases: {error}")
