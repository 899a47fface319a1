"""Suites of questions with known answers: multiple choice, generated answers, code with tests, lm-eval's tasks."""
