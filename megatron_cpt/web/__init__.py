"""The web page: runs to watch and compare, jobs to prepare and start. The run folders are its only state."""
