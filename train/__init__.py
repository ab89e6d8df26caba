"""train: data to weights. So far: MuonClip, schedules and the loss."""
