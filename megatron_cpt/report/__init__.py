"""The report of one or more runs, for the person who decides and the one who does it again."""
