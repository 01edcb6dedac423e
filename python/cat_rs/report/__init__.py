"""Evaluations and trainings for the eye: a table, a contact sheet, curves, and a page with all of them."""

from __future__ import annotations

from cat_rs.report.curves import training_curves
from cat_rs.report.picture_files import save_all_pictures
from cat_rs.report.sheet import contact_sheet, draw_contact_sheet
from cat_rs.report.table import format_table, print_table
from cat_rs.report.writer import write_report
from cat_rs.run_folder import PICTURES_FOLDER

__all__ = [
    "PICTURES_FOLDER",
    "contact_sheet",
    "draw_contact_sheet",
    "format_table",
    "print_table",
    "save_all_pictures",
    "training_curves",
    "write_report",
]
