package kube

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

const (
	// advertiseAddress is from a documentation range: endpoints refuse loopback addresses.
	advertiseAddress = "192.0.2.1"
	adminToken       = "kelson-test-admin"
	// compactionInterval is how often the apiserver compacts; a revision is gone after two rounds.
	compactionInterval = 5 * time.Second
	// eventTTL is the lease of Event objects.
	eventTTL = 10 * time.Second
	// patience bounds every wait for something that has to happen eventually.
	patience = 90 * time.Second
)

// world is one store and one kube-apiserver on loopback.
type world struct {
	pki          *pki
	dir          string
	storePort    int
	peerPort     int
	apiPort      int
	secondPort   int
	store        *process
	apiserver    *process
	second       *process
	storeBinary  string
	apiserverBin string

	clients *kubernetes.Clientset
	dynamic *dynamic.DynamicClient
	config  *rest.Config
	etcd    *clientv3.Client
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	ports := freePorts(t, 4)
	w := &world{
		pki: newPKI(t, dir), dir: dir,
		storePort: ports[0], peerPort: ports[1], apiPort: ports[2], secondPort: ports[3],
		storeBinary:  binary(t, "KELSON_BIN", "../../target/release/kelson"),
		apiserverBin: binary(t, "KUBE_APISERVER_BIN", ""),
	}
	t.Cleanup(func() { w.stop(t) })
	w.startStore(t)
	etcd, err := clientv3.New(clientv3.Config{
		Endpoints: []string{w.storeURL()}, TLS: w.pki.clientTLS(t, true),
		DialTimeout: 10 * time.Second, Logger: zap.NewNop(),
	})
	must(t, err, "connect to the store")
	w.etcd = etcd
	w.waitStore(t)
	w.startAPIServer(t)
	w.config = w.configFor(w.apiPort)
	w.clients, err = kubernetes.NewForConfig(w.config)
	must(t, err, "make the typed client")
	w.dynamic, err = dynamic.NewForConfig(w.config)
	must(t, err, "make the dynamic client")
	w.waitAPIServer(t)
	return w
}

func (w *world) configFor(port int) *rest.Config {
	return &rest.Config{
		Host:            fmt.Sprintf("https://127.0.0.1:%d", port),
		BearerToken:     adminToken,
		TLSClientConfig: rest.TLSClientConfig{CAFile: w.pki.caFile},
		QPS:             -1, // no client-side throttling
		Timeout:         60 * time.Second,
	}
}

// binary finds a program under test; one that is missing is a failure, never a skip.
func binary(t *testing.T, variable, fallback string) string {
	t.Helper()
	path := os.Getenv(variable)
	if path == "" {
		path = fallback
	}
	if path == "" {
		t.Fatalf("%s is not set: run this through `cargo xtask kube`", variable)
	}
	absolute, err := filepath.Abs(path)
	must(t, err, "resolve "+path)
	if _, err := os.Stat(absolute); err != nil {
		t.Fatalf("%s: %v", variable, err)
	}
	return absolute
}

func (w *world) storeURL() string { return fmt.Sprintf("https://127.0.0.1:%d", w.storePort) }

func (w *world) startStore(t *testing.T) {
	t.Helper()
	peer := fmt.Sprintf("http://127.0.0.1:%d", w.peerPort)
	w.store = start(t, filepath.Join(w.dir, "store.log"), w.storeBinary,
		"--name=kube-test",
		"--data-dir="+filepath.Join(w.dir, "store"),
		"--listen-client-urls="+w.storeURL(),
		"--advertise-client-urls="+w.storeURL(),
		"--listen-peer-urls="+peer,
		"--initial-advertise-peer-urls="+peer,
		"--initial-cluster=kube-test="+peer,
		"--cert-file="+w.pki.storeServer.certFile,
		"--key-file="+w.pki.storeServer.keyFile,
		"--trusted-ca-file="+w.pki.caFile,
		"--client-cert-auth=true",
		"--watch-progress-notify-interval=5s",
	)
}

func (w *world) waitStore(t *testing.T) {
	t.Helper()
	eventually(t, "the store answers", func(ctx context.Context) error {
		if !w.store.running() {
			t.Fatalf("the store ended; its log ends with:\n%s", w.store.logTail())
		}
		_, err := w.etcd.Get(ctx, "/registry/health")
		return err
	})
}

func (w *world) startAPIServer(t *testing.T) {
	t.Helper()
	w.apiserver = w.launchAPIServer(t, "apiserver.log", w.apiPort, advertiseAddress)
}

func (w *world) launchAPIServer(t *testing.T, log string, port int, address string) *process {
	t.Helper()
	tokens := filepath.Join(w.dir, "tokens.csv")
	line := adminToken + ",admin,admin-uid,system:masters\n"
	must(t, os.WriteFile(tokens, []byte(line), 0o600), "write the token file")
	return start(t, filepath.Join(w.dir, log), w.apiserverBin,
		"--etcd-servers="+w.storeURL(),
		"--etcd-cafile="+w.pki.caFile,
		"--etcd-certfile="+w.pki.storeClient.certFile,
		"--etcd-keyfile="+w.pki.storeClient.keyFile,
		"--etcd-compaction-interval="+compactionInterval.String(),
		"--event-ttl="+eventTTL.String(),
		"--bind-address=127.0.0.1",
		fmt.Sprintf("--secure-port=%d", port),
		"--advertise-address="+address,
		"--tls-cert-file="+w.pki.apiserver.certFile,
		"--tls-private-key-file="+w.pki.apiserver.keyFile,
		"--token-auth-file="+tokens,
		"--authorization-mode=RBAC",
		"--disable-admission-plugins=ServiceAccount",
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+w.pki.serviceAccount,
		"--service-account-signing-key-file="+w.pki.serviceAccount,
		"--service-cluster-ip-range=10.96.0.0/24",
	)
}

// waitAPIServer waits for /readyz, which covers the store, all post-start hooks and informers.
func (w *world) waitAPIServer(t *testing.T) {
	t.Helper()
	w.waitReady(t, w.apiserver, w.apiPort)
}

func (w *world) waitReady(t *testing.T, server *process, port int) {
	t.Helper()
	roots := w.pki.clientTLS(t, false).RootCAs
	client := &http.Client{
		Timeout:   5 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}},
	}
	eventually(t, "kube-apiserver is ready", func(ctx context.Context) error {
		if !server.running() {
			t.Fatalf("kube-apiserver ended; its log ends with:\n%s", server.logTail())
		}
		request, err := http.NewRequestWithContext(ctx, "GET", fmt.Sprintf("https://127.0.0.1:%d/readyz", port), nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("/readyz says %s", response.Status)
		}
		return nil
	})
}

func (w *world) stop(t *testing.T) {
	if w.etcd != nil {
		w.etcd.Close()
	}
	for _, p := range []*process{w.second, w.apiserver, w.store} {
		if p != nil {
			p.kill()
			if t.Failed() {
				t.Logf("log of %s ends with:\n%s", filepath.Base(p.program), p.logTail())
			}
		}
	}
}

// process is a child whose output goes to a file.
type process struct {
	program string
	logPath string
	command *exec.Cmd
	done    chan struct{}
}

func start(t *testing.T, logPath, program string, args ...string) *process {
	t.Helper()
	logFile, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err, "open "+logPath)
	defer logFile.Close()
	command := exec.Command(program, args...)
	command.Stdout, command.Stderr = logFile, logFile
	// The child must not outlive a test that is killed.
	command.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, command.Start(), "start "+program)
	p := &process{program: program, logPath: logPath, command: command, done: make(chan struct{})}
	go func() {
		_ = command.Wait()
		close(p.done)
	}()
	return p
}

func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill is the hard way out: no chance to flush or to say goodbye.
func (p *process) kill() {
	_ = p.command.Process.Kill()
	<-p.done
}

// terminate asks politely and fails the test if that does not end the process.
func (p *process) terminate(t *testing.T) {
	t.Helper()
	must(t, p.command.Process.Signal(syscall.SIGTERM), "signal "+p.program)
	select {
	case <-p.done:
	case <-time.After(patience):
		t.Fatalf("%s did not end after SIGTERM", p.program)
	}
}

func (p *process) logTail() string {
	text, err := os.ReadFile(p.logPath)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}

// eventually repeats check until it succeeds or patience ends.
func eventually(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var last error
	for {
		attempt, cancelAttempt := context.WithTimeout(ctx, 10*time.Second)
		err := check(attempt)
		cancelAttempt()
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: not within %v; last: %v", what, patience, last)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func freePorts(t *testing.T, count int) []int {
	t.Helper()
	var ports []int
	var held []net.Listener
	for range count {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err, "find a free port")
		held = append(held, listener)
		ports = append(ports, listener.Addr().(*net.TCPAddr).Port)
	}
	for _, listener := range held {
		listener.Close()
	}
	return ports
}
