"""Audits: what a learned prompt is and does, measured, as a page for people and as JSON."""

from .errors import AuditError
from .report import Report
from .run import audit

__all__ = ["AuditError", "Report", "audit"]
