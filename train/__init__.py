"""train: data to weights. So far: MuonClip, the router's balance, schedules and the loss."""
