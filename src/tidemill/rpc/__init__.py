"""What every gRPC server and channel of Tidemill shares."""
