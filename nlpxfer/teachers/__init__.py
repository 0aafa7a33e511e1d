"""Who teaches a student, and on which rows: what `recipes/distill.py` needs of teachers, from options to columns.

teachers = open_teachers(run, options)               # those that are given, checked before anything is written
panel = measure_panel(run, options, teachers)        # their scores, temperatures and weights
rows = TransferRows(run, panel)                      # training rows with what they say
"""

from nlpxfer.teachers.chain import check_assistants, folds_of_teacher, taught_by_each_other, train_on_folds
from nlpxfer.teachers.curve import check_curve, transfer_curve
from nlpxfer.teachers.panel import Panel, answers_all, measure_panel
from nlpxfer.teachers.rows import TransferRows, check_contradiction_weight, with_unlabelled
from nlpxfer.teachers.start import start_of
from nlpxfer.teachers.teacher import FileTeacher, ModelTeacher, Teacher, ZeroShotTeacher, open_teachers

__all__ = [
    "FileTeacher",
    "ModelTeacher",
    "Panel",
    "Teacher",
    "TransferRows",
    "ZeroShotTeacher",
    "answers_all",
    "check_assistants",
    "check_contradiction_weight",
    "check_curve",
    "folds_of_teacher",
    "measure_panel",
    "open_teachers",
    "start_of",
    "taught_by_each_other",
    "train_on_folds",
    "transfer_curve",
    "with_unlabelled",
]
