"""What a run will need before it starts: memory, time, disk and cost, and which layouts are worth renting. No torch."""
