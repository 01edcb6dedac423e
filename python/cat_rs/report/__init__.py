"""Evaluations and trainings for the eye: a table, a contact sheet, curves, and a page with all of them."""

from __future__ import annotations

from cat_rs.report.contact_sheet import contact_sheet, draw_contact_sheet
from cat_rs.report.curves import training_curves
from cat_rs.report.pictures import PICTURES_FOLDER, save_all_pictures
from cat_rs.report.report import write_report
from cat_rs.report.table import format_table, print_table

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
