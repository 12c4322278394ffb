"""What people read: tables on a terminal, and one self-contained HTML page."""
