package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"go.etcd.io/etcd/client/v3/naming/resolver"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
)

// names registers two services in the store and calls them by name; calls follow what is registered.
func names(ctx context.Context, client *clientv3.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	other, err := dial()
	if err != nil {
		return err
	}
	defer other.Close()
	target := prefix + "naming"
	manager, err := endpoints.NewManager(client, target)
	if err != nil {
		return err
	}
	addresses := map[string]string{}
	for _, name := range []string{"one", "two"} {
		address, stop, err := serve(name)
		if err != nil {
			return err
		}
		defer stop()
		addresses[name] = address
	}
	watching, err := endpoints.NewManager(other, target)
	if err != nil {
		return err
	}
	changes, err := watching.NewWatchChannel(ctx)
	if err != nil {
		return err
	}
	lease, err := client.Grant(ctx, 60)
	if err != nil {
		return err
	}
	one := endpoints.Endpoint{Addr: addresses["one"], Metadata: "first"}
	if err := manager.AddEndpoint(ctx, target+"/one", one, clientv3.WithLease(lease.ID)); err != nil {
		return err
	}
	outside := manager.AddEndpoint(ctx, "elsewhere/one", one)
	builder, err := resolver.NewBuilder(other)
	if err != nil {
		return err
	}
	conn, err := grpc.NewClient("etcd:///"+target, grpc.WithResolvers(builder),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := reaches(ctx, conn, "one"); err != nil {
		return err
	}
	two := endpoints.Endpoint{Addr: addresses["two"]}
	if err := manager.Update(ctx, []*endpoints.UpdateWithOpts{
		endpoints.NewAddUpdateOpts(target+"/two", two),
	}); err != nil {
		return err
	}
	if err := reaches(ctx, conn, "one", "two"); err != nil {
		return err
	}
	listed, err := watching.List(ctx)
	if err != nil {
		return err
	}
	// The end of the lease takes the first service out of the calls.
	if _, err := client.Revoke(ctx, lease.ID); err != nil {
		return err
	}
	if err := reaches(ctx, conn, "two"); err != nil {
		return err
	}
	if err := manager.DeleteEndpoint(ctx, target+"/two"); err != nil {
		return err
	}
	var story []string
	for len(story) < 4 {
		select {
		case updates, open := <-changes:
			if !open {
				return fmt.Errorf("the watch ended after %v", story)
			}
			for _, update := range updates {
				story = append(story, fmt.Sprintf("%d %s", update.Op, update.Key))
			}
		case <-time.After(within):
			return fmt.Errorf("the watch stopped after %v", story)
		}
	}
	return errors.Join(
		same("an endpoint outside is refused", outside != nil, true),
		same("listed", slices.Sorted(maps.Keys(listed)), []string{target + "/one", target + "/two"}),
		same("address", listed[target+"/one"].Addr, addresses["one"]),
		same("metadata", listed[target+"/one"].Metadata, "first"),
		same("changes", story, []string{
			fmt.Sprint(endpoints.Add, " ", target, "/one"), fmt.Sprint(endpoints.Add, " ", target, "/two"),
			fmt.Sprint(endpoints.Delete, " ", target, "/one"), fmt.Sprint(endpoints.Delete, " ", target, "/two"),
		}),
	)
}

// serve starts a gRPC service that tells its name in the header of every answer.
func serve(name string) (string, func(), error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	server := grpc.NewServer(grpc.UnaryInterceptor(
		func(ctx context.Context, request any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if err := grpc.SetHeader(ctx, metadata.Pairs("who", name)); err != nil {
				return nil, err
			}
			return next(ctx, request)
		}))
	healthpb.RegisterHealthServer(server, health.NewServer())
	go func() {
		// Ends with the server; a call that fails before says more than this error.
		_ = server.Serve(listener)
	}()
	return listener.Addr().String(), server.Stop, nil
}

// reaches calls until a row of calls gets answers from exactly these services.
func reaches(ctx context.Context, conn *grpc.ClientConn, want ...string) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for {
		seen := map[string]bool{}
		for range 8 {
			var header metadata.MD
			_, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{},
				grpc.Header(&header), grpc.WaitForReady(true))
			if err != nil {
				return fmt.Errorf("call by name, to reach %v: %w", want, err)
			}
			for _, name := range header.Get("who") {
				seen[name] = true
			}
		}
		if slices.Equal(slices.Sorted(maps.Keys(seen)), want) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
}
