"""Measuring a model: teacher-forced scores, greedy answers, suites, and a verdict that names its evidence."""
