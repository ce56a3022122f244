"""Take the result away: merged models, PEFT folders, our own adapter folders. Needs neither Lightning nor peft."""
