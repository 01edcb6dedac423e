"""Evaluations and trainings for the eye: a table, a contact sheet and curves."""

from __future__ import annotations

from cat_rs.report.contact_sheet import contact_sheet, draw_contact_sheet
from cat_rs.report.curves import training_curves
from cat_rs.report.table import format_table, print_table

__all__ = ["contact_sheet", "draw_contact_sheet", "format_table", "print_table", "training_curves"]
