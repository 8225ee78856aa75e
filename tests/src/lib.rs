//! Test harness: starts members as processes, speaks gRPC to them, runs golden scripts.
