"""What is to be done next follows from what lies in the output folder: so a killed benchmark simply goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from loku.bench.recipe import Arm, Recipe
from loku.bench.store import Record, Task, noise_count, noise_names, read_record
from loku.bench.tuning import choose


@dataclass
class Schedule:
    """All tasks of a recipe, in order: models, tuning runs, and the runs at each arm's chosen point."""

    recipe: Recipe
    root: str
    only: tuple[str, ...] = ()  # the names of the arms to run; all of them when empty
    _found: dict[Path, Record] = field(default_factory=dict)

    def record(self, task: Task) -> Record | None:
        """Return a task's result, or None while it is not there. A file is read once."""
        path = task.path
        if path not in self._found:
            found = read_record(path)
            if found is None or (task.arm is None and len(noise_names(found)) < noise_count(self.recipe, task.seed)):
                return None
            self._found[path] = found
        return self._found[path]

    @property
    def arms(self) -> list[Arm]:
        """The arms that are to be run."""
        return [arm for arm in self.recipe.arms if not self.only or arm.name in self.only]

    def models(self, seed: int) -> Task:
        """Return the task that makes a seed's models."""
        return Task("models", self.root, seed, self.recipe)

    def attacks(self) -> list[Task]:
        """Return the tasks that attack each reported seed's own models; none without attacks on the arms to be run."""
        wanted = [seed for seed in self.recipe.seeds if any(self.recipe.attacked(arm, seed) for arm in self.arms)]
        return [Task("attacks", self.root, seed, self.recipe) for seed in wanted]

    def measured(self, seed: int) -> Record | None:
        """Return a seed's models as they are reported: with what attacks found on the noise floor's, if any did."""
        found = self.record(self.models(seed))
        if found is None or self.recipe.attack is None:
            return found
        attacked = self.record(Task("attacks", self.root, seed, self.recipe))
        return found if attacked is None else {**found, "attacks": attacked["models"]}

    def trial(self, arm: Arm, point: Mapping[str, Any], seed: int) -> Task:
        """Return the task of one run."""
        return Task("trial", self.root, seed, self.recipe, arm, point)

    def tuning(self, arm: Arm) -> list[list[Task]]:
        """Return an arm's tuning runs, a list for each grid point; none where there is nothing to choose."""
        points = self.recipe.points(arm)
        if len(points) < 2:
            return []
        return [[self.trial(arm, point, seed) for seed in self.recipe.tuning.seeds] for point in points]

    def chosen(self, arm: Arm) -> tuple[Mapping[str, Any], list[dict[str, Any]]] | None:
        """Return an arm's grid point and how it was chosen, or None while tuning runs are missing."""
        tuned = self.recipe.tuned_as(arm)
        points, tasks = self.recipe.points(tuned), self.tuning(tuned)
        if not tasks:
            return points[0], []
        runs = [[self.record(task) for task in group] for group in tasks]
        models = {seed: self.record(self.models(seed)) for seed in self.recipe.tuning.seeds}
        if any(found is None for found in (*models.values(), *(run for group in runs for run in group))):
            return None
        known = [[run for run in group if run is not None] for group in runs]
        return choose(self.recipe.tuning.choose, points, known, {s: m for s, m in models.items() if m is not None})

    def final(self, arm: Arm) -> list[Task]:
        """Return the runs that are reported for an arm, or none while its tuning is not done."""
        found = self.chosen(arm)
        return [] if found is None else [self.trial(arm, found[0], seed) for seed in self.recipe.seeds]

    def tuned_arms(self) -> list[Arm]:
        """Return the arms that tuning runs are made for."""
        return list({arm.slug: arm for arm in map(self.recipe.tuned_as, self.arms)}.values())

    def ready(self) -> list[Task]:
        """Return the tasks that are not done and could be done now, the most urgent first."""
        waiting = [self.models(seed) for seed in self.model_seeds()]
        models = [task for task in waiting if self.record(task) is None]
        tuning = [task for arm in self.tuned_arms() for group in self.tuning(arm) for task in group]
        final = [task for arm in self.arms for task in self.final(arm)]
        without = {task.seed for task in models}
        attacks = [task for task in self.attacks() if task.seed not in without and self.record(task) is None]
        alone = {task.seed for task in attacks}
        trials = {
            task.path: task
            for task in (*tuning, *final)
            if task.seed not in without and task.arm is not None
            and not (task.seed in alone and self.recipe.attacked(task.arm, task.seed))
        }  # fmt: skip
        return [*models, *attacks, *(task for task in trials.values() if self.record(task) is None)]

    def model_seeds(self) -> tuple[int, ...]:
        """Return the seeds that models are needed for: those of the tuning only where something is tuned."""
        tuned = any(self.tuning(arm) for arm in self.tuned_arms())
        return self.recipe.model_seeds if tuned else self.recipe.seeds

    def counts(self) -> dict[str, int]:
        """Return how many tasks of each kind there are in all; runs that serve two purposes count once."""
        tuning = {task.path for arm in self.tuned_arms() for group in self.tuning(arm) for task in group}
        final = len(self.arms) * len(self.recipe.seeds)
        return {
            "models": len(self.model_seeds()),
            "tuning": len(tuning),
            "final": final,
            "attacks": len(self.attacks()),
        }

    def done(self) -> int:
        """Return how many of the tasks are done."""
        tasks = [*(self.models(seed) for seed in self.model_seeds()), *self.attacks()]
        tasks += [task for arm in self.tuned_arms() for group in self.tuning(arm) for task in group]
        tasks += [task for arm in self.arms for task in self.final(arm)]
        return len({task.path for task in tasks if self.record(task) is not None})

    def seconds(self) -> dict[str, float | None]:
        """Return what a task of each kind takes: the median of those that are done, else what the recipe expects.

        "attack" is one model under all attacks, which is no part of "trial".
        """
        models = [self.record(self.models(seed)) for seed in self.model_seeds()]
        taken = [found["seconds"]["all"] for found in models if found is not None]
        own = [found["seconds"] for found in self._found.values() if "arm" in found]
        runs = [seconds["all"] - seconds.get("attacks", 0.0) for seconds in own]
        attacks = [seconds["attacks"] for seconds in own if "attacks" in seconds]
        expected = self.recipe.seconds
        return {
            "models": median(taken) if taken else expected.get("models"),
            "trial": median(runs) if runs else expected.get("trial"),
            "attack": median(attacks) if attacks else expected.get("attack"),
        }

    def core_hours(self) -> float | None:
        """Return the core-hours that are still to come, or None when nothing is known of them."""
        counts, seconds = self.counts(), self.seconds()
        models, trial, attack = (seconds[kind] for kind in ("models", "trial", "attack"))
        if models is None or trial is None or (attack is None and self.attacks()):
            return None
        missing = sum(self.record(self.models(seed)) is None for seed in self.model_seeds())
        alone = sum(self.record(task) is None for task in self.attacks())
        done = self.done() - (counts["models"] - missing) - (counts["attacks"] - alone)
        trials = counts["tuning"] + counts["final"] - done
        attacked = alone * (2 + self.recipe.noise_floor) + self._unattacked()
        return (missing * models + trials * trial + attacked * (attack or 0.0)) / 3600

    def _unattacked(self) -> int:
        """Return how many runs are still to be attacked."""
        pairs = [(arm, seed) for arm in self.arms for seed in self.recipe.seeds if self.recipe.attacked(arm, seed)]
        done = [
            self.record(task) for arm in self.arms for task in self.final(arm) if self.recipe.attacked(arm, task.seed)
        ]
        return len(pairs) - sum(found is not None for found in done)

    def finished(self) -> list[Record]:
        """Return the runs that are reported, in the order of the arms, as far as they are there."""
        tasks = [task for arm in self.recipe.arms for task in self.final(arm)]
        return [found for found in map(self.record, tasks) if found is not None]
